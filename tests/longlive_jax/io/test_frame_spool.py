"""Frames in a temporary file."""

import numpy as np
import pytest

from longlive_jax.io.frame_spool import FrameSpool
from longlive_jax.spec import Failure


def test_any_frames_can_be_read_again(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (9, 4, 6, 3), np.uint8)
    with FrameSpool(tmp_path) as spool:
        spool.append(frames[:5])
        np.testing.assert_array_equal(spool.read([4, 0]), frames[[4, 0]])
        spool.append(frames[5:])
        assert spool.frames == 9
        np.testing.assert_array_equal(spool.read(range(3, 9)), frames[3:])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_failure(tmp_path):
    with FrameSpool(tmp_path) as spool, open("/dev/full", "wb", buffering=0) as full:
        spool._file.close()
        spool._file = full
        with pytest.raises(Failure, match=r"cannot be written .*free some space"):
            spool.append(np.zeros((1, 4, 4, 3), np.uint8))
