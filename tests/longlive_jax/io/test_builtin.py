"""A checkpoint is found by its path or by the built-in one's name."""

import pytest

from longlive_jax.io.builtin import (
    BUILTIN_ADAPTER,
    builtin_checkpoint,
    find_adapter,
    find_checkpoint,
)
from longlive_jax.spec import UserError


@pytest.mark.parametrize("name", [None, "small_world"])
def test_the_built_in_checkpoint_needs_no_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint(name) == builtin_checkpoint()


def test_a_folder_takes_precedence_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small_world").mkdir()
    assert find_checkpoint("small_world").resolve() == tmp_path / "small_world"


@pytest.mark.parametrize("name", ["nowhere", 3])
def test_what_is_no_checkpoint_is_refused(name):
    with pytest.raises(UserError, match=rf"{name}"):
        find_checkpoint(name)


def test_the_built_in_adapter_needs_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_adapter(BUILTIN_ADAPTER) == builtin_checkpoint(BUILTIN_ADAPTER)
    (tmp_path / BUILTIN_ADAPTER).mkdir()
    assert find_adapter(BUILTIN_ADAPTER).resolve() == tmp_path / BUILTIN_ADAPTER
