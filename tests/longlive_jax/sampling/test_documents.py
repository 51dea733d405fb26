"""Files that other people wrote: encodings, limits, and errors that name the place."""

import json

import pytest

from longlive_jax.sampling.documents import MAX_BYTES, read_document, read_text
from longlive_jax.sampling.script import read_scripts
from longlive_jax.sampling.timeline import make_timeline
from longlive_jax.spec import UserError

BOMB = "size: [&a [x, x]" + "".join(
    f", &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
REJECTED = [
    ("a.yaml", BOMB + "]", r"line 1, column \d+: .*alias \*b of nested values"),
    ("a.yaml", "[" * 5000, "line 1, column 21: .*more than 20 levels"),
    ("a.json", "[" * 200_000, "more than 20 levels"),
    ("a.yaml", "seed: 1\nshots: []\nseed: 2", "line 3, column 1: .*'seed' occurs twice"),
    ("a.json", '{"seed": 1, "seed": 2}', "'seed' occurs twice"),
    ("a.yaml", 'seed: !!bool ""', "line 1, column 7: .*'' is not a value of type bool"),
    ("a.yaml", 'seed: !!int ""', "not a value of type int"),
    ("a.yaml", 'seed: !!timestamp "1"', "not a value of type timestamp"),
    ("a.yaml", "seed: 2020-99-99", "not a value of type timestamp"),
    ("a.yaml", "!!python/object/apply:os.system ['ls']", "could not determine a constructor"),
    ("a.yaml", "? [a]\n: 1", "unhashable key"),
    ("a.yaml", "a: 1\n---\nb: 2", "line 2, column 1: .*another document"),
    ("a.yaml", "a\0b", "not valid yaml"),
    ("a.json", '{"a": ', "line 1, column 7: not valid json"),
]


@pytest.mark.parametrize(("name", "text", "message"), REJECTED)
def test_rejected_documents(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_document(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_aliases_of_plain_values_and_merged_shots(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "shots:\n- &s {prompt: &p a cat, chunks: 2}\n- {<<: *s, cut: false}\n"
        "- {prompt: *p, chunks: 1}\n"
    )
    (script,) = read_scripts(tmp_path / "a.yaml")
    assert [(s.prompt, s.chunks, s.cut) for s in script.shots] == [
        ("a cat", 2, None), ("a cat", 2, False), ("a cat", 1, None),
    ]  # fmt: skip


def test_byte_order_marks_and_other_encodings(tmp_path):
    values = {"shots": [{"prompt": "a café", "chunks": 1}]}
    text = json.dumps(values, ensure_ascii=False)
    (tmp_path / "caption").mkdir()
    for name, content in (
        ("a.json", text), ("a.yaml", text), ("a.YML", text), ("a.txt", "a café"),
        ("caption/0.json", '{"caption": "a café"}'), ("caption/shot_durations.txt", "1"),
    ):  # fmt: skip
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
    for name in ("a.json", "a.yaml", "a.YML", "a.txt", "caption"):
        (script,) = read_scripts(tmp_path / name, chunks=1)
        assert script.shots[0].prompt == "a café"
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "b.yaml").write_text(text, encoding=encoding)
        with pytest.raises(UserError, match=r"b\.yaml: byte \d+ is not UTF-8 text .*save it as"):
            read_document(tmp_path / "b.yaml")


def test_large_files_are_not_read(tmp_path):
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(UserError, match=f"must be <= {MAX_BYTES}"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{prompt: a, chunks: 2000000000}", r"shots\[0\].*chunks must be positive and <= 200000"),
        ("{prompt: a, seconds: 1.0e+308}", "seconds must be positive and <= 86400"),
        ("{prompt: a, chunks: 0x" + "f" * 5000 + "}", "got more than 1e9"),
        ("{prompt: a, seconds: 1" + "0" * 400 + "}", "seconds: expected a finite number"),
        ("{prompt: a, seconds: .inf}", "expected a finite number, got inf"),
        ("{prompt: a, seconds: .nan}", "expected a finite number, got nan"),
        ("{prompt: a, seconds: true}", "expected float, got True"),
        ("{prompt: a, chunks: 1, cut: 1}", "expected bool, got 1"),
        ('{prompt: "\\ud800", chunks: 1}', "half a surrogate pair"),
        ("{prompt: 2020-01-01, chunks: 1}", "prompt: expected str"),
    ],
)
def test_values_beyond_the_limits_of_a_shot(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(f"shots:\n- {text}\n")
    with pytest.raises(UserError, match=message) as caught:
        read_scripts(tmp_path / "a.yaml")
    assert str(tmp_path / "a.yaml") in str(caught.value) and len(str(caught.value)) < 500


def test_videos_beyond_the_limit_of_chunks(tmp_path):
    shot = "{prompt: a, chunks: 150000}"
    (tmp_path / "a.yaml").write_text(f"shots: [{shot}, {shot}]")
    with pytest.raises(UserError, match=r"a: the shots have 300000 chunks of 1\.33 s; must be <="):
        make_timeline(read_scripts(tmp_path / "a.yaml"), chunk_frames=8)
    (tmp_path / "b.yaml").write_text("size: [32000000, 32]\nshots: [{prompt: a, chunks: 1}]")
    with pytest.raises(UserError, match="must be <= 8192 pixels on each side"):
        read_scripts(tmp_path / "b.yaml")
