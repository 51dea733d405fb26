"""Latents are readable after every chunk, also when the disk is full."""

import resource
import signal

import numpy as np
import pytest

from longlive_jax.io.latents_file import LatentsFile
from longlive_jax.spec import Failure


def test_it_is_complete_after_every_chunk(tmp_path):
    latents = np.random.default_rng(0).normal(size=(12, 4, 4, 8)).astype(np.float32)
    file = LatentsFile(tmp_path / "a.npy")
    for start, end in ((0, 5), (5, 12)):
        file.append(latents[start:end])
        np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), latents[:end])


def test_a_full_disk_is_one_line_and_earlier_latents_stay(tmp_path):
    """A limit on the size of files stands for the full disk."""
    latents = np.ones((10, 8, 8, 16), np.float32)
    file = LatentsFile(tmp_path / "a.npy")
    file.append(latents)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        with pytest.raises(Failure, match=r"a.npy: cannot be written \(File too large\)"):
            file.append(latents)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), latents)
