"""Datasets and stores that several test files read."""

import pytest

from tests.longlive_jax.data.clips.counting import CountingEncoders, encode, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The folder of `write_dataset`."""
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def reference(dataset, tmp_path_factory):
    """(folder, manifest, encoders) of an uninterrupted encoding of the dataset."""
    out = tmp_path_factory.mktemp("reference") / "out"
    encoders = CountingEncoders()
    return out, encode(dataset, out, encoders), encoders
