"""Named arrays in one string of bytes: a JSON header, then the arrays as they lie in memory.

8 bytes   length of the header, little-endian
header    {"arrays": {name: [dtype, shape]}, "meta": {...}, "crc32": of the rest}
rest      the arrays in the header's order, C order, without gaps
"""

import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from longlive_jax.data.clips.dataset import Unusable

__all__ = ["dtype_of", "pack", "unpack"]


def dtype_of(name: str) -> np.dtype:
    """A NumPy type by its name, "bfloat16" included."""
    return np.dtype(getattr(ml_dtypes, name, name))


def pack(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> bytes:
    """The bytes of arrays and of anything that JSON can hold beside them."""
    bodies = [np.ascontiguousarray(x).reshape(-1).view(np.uint8).tobytes() for x in arrays.values()]
    body = b"".join(bodies)
    header = {
        "arrays": {name: [x.dtype.name, list(x.shape)] for name, x in arrays.items()},
        "meta": dict(meta),
        "crc32": zlib.crc32(body),
    }
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + body


def unpack(record: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and what was beside them. Raises Unusable if a bit is not as it was written."""
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
