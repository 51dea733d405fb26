"""Output folders are created, and checked before anything is written."""

import pytest

from longlive_jax.io.paths import check_writable
from longlive_jax.spec import UserError


def test_folders_are_created(tmp_path):
    folder = check_writable(tmp_path / "x" / "y")
    assert folder.is_dir() and list(folder.iterdir()) == []


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file.*choose another folder"):
        check_writable(tmp_path / "file" / "out")
