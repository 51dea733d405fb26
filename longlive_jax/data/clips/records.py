"""Serialises named arrays to bytes: a JSON header, then the raw arrays.

8 bytes   length of the header, little-endian
header    {"arrays": {name: [dtype, shape]}, "meta": {...}, "crc32": checksum of the data}
data      the arrays in the header's order, C-contiguous, without padding
"""

import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from longlive_jax.data.clips.dataset import Unusable

__all__ = ["dtype_of", "pack_record", "unpack_record"]


def dtype_of(name: str) -> np.dtype:
    """The NumPy dtype of this name, including "bfloat16"."""
    return np.dtype(getattr(ml_dtypes, name, name))


def pack_record(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> bytes:
    """Serialises arrays, and metadata of any type that JSON supports."""
    bodies = [np.ascontiguousarray(x).reshape(-1).view(np.uint8).tobytes() for x in arrays.values()]
    body = b"".join(bodies)
    header = {
        "arrays": {name: [x.dtype.name, list(x.shape)] for name, x in arrays.items()},
        "meta": dict(meta),
        "crc32": zlib.crc32(body),
    }
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + body


def unpack_record(record: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays and the metadata of a record. Raises Unusable if any bit has changed."""
    try:
        length = int.from_bytes(record[:8], "little")
        header = json.loads(record[8 : 8 + length])
        body = memoryview(record)[8 + length :]
        if zlib.crc32(body) != header["crc32"]:
            raise ValueError("the checksum does not match")
        arrays, at = {}, 0
        for name, (kind, shape) in header["arrays"].items():
            dtype = dtype_of(kind)
            size = math.prod(shape) * dtype.itemsize
            arrays[name] = np.frombuffer(body[at : at + size], dtype).reshape(shape)
            at += size
        return arrays, header["meta"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unusable(f"damaged record ({error})") from error
