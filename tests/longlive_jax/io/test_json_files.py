"""JSON files next to weights are read, or refused in one line."""

import pytest

from longlive_jax.io.json_files import read_json_object
from longlive_jax.spec import UserError


def test_an_object_is_read_with_and_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "x.json"
    assert read_json_object(path) is None
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text('{"eps": 1e-06}', encoding=encoding)
        assert read_json_object(path) == {"eps": 1e-6}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_json_object(path)
    assert str(path) in str(caught.value)
