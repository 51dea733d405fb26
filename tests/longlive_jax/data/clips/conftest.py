"""Datasets and stores that the tests of several files read."""

import pytest

from tests.longlive_jax.data.clips.counting import Counting, run, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Of `write_dataset`."""
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A store of it, its manifest, and the encoders that made it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    counting = Counting()
    return out, run(dataset, out, counting), counting
