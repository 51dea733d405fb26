"""Serialised arrays: round trips, and damage that is detected."""

import ml_dtypes
import numpy as np
import pytest

from longlive_jax.data.clips.dataset import Unusable
from longlive_jax.data.clips.records import pack_record, unpack_record


def test_round_trip():
    arrays = {
        "a": np.arange(6, dtype=np.float16).reshape(2, 3),
        "b": np.array([1.5, -2], ml_dtypes.bfloat16),
        "c": np.array([True, False]),
        "d": np.float32(3.5) * np.ones(()),
        "e": np.zeros((0, 4), np.int32),
        "f": np.arange(8).reshape(2, 4)[:, ::2],
    }
    unpacked, meta = unpack_record(pack_record(arrays, {"name": "täst", "n": 3}))
    assert meta == {"name": "täst", "n": 3} and list(unpacked) == list(arrays)
    for name, array in arrays.items():
        assert unpacked[name].dtype == array.dtype and unpacked[name].shape == array.shape
        np.testing.assert_array_equal(unpacked[name], array)


@pytest.mark.parametrize("at", [0, 12, 40, -3])
def test_damage_is_detected(at):
    record = bytearray(pack_record({"a": np.arange(9.0)}, {}))
    record[at] ^= 0x55
    with pytest.raises(Unusable, match="damaged record"):
        unpack_record(bytes(record))


@pytest.mark.parametrize("length", [0, 5, 30, -1])
def test_missing_bytes_are_detected(length):
    with pytest.raises(Unusable, match="damaged record"):
        unpack_record(pack_record({"a": np.arange(9.0)}, {})[:length])
