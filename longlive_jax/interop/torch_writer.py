"""Checkpoints as `torch.save` writes them, without PyTorch: plain containers and tensors.

A zip archive of uncompressed members: a pickle stream of a handful of opcodes, spelt here by hand,
and the bytes of one storage a tensor. `torch.load(weights_only=True)` reads it, and so does
`torch_file.read_torch`. Nothing in it depends on when or where it was written.
"""

import io
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from longlive_jax.interop.safetensors_file import Outgoing

__all__ = ["write_torch"]

ALIGNMENT = 64
"""Of the bytes of a tensor in the file, as PyTorch has it."""

_STORAGES = {
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.int16): "ShortStorage",
    np.dtype(np.int8): "CharStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
}
_UNTYPED = {
    np.dtype(ml_dtypes.float8_e4m3fn): "float8_e4m3fn",
    np.dtype(ml_dtypes.float8_e5m2): "float8_e5m2",
}
"""Types that are younger than typed storages."""


def write_torch(
    path: Path, value: Mapping[str, Any], *, progress: Callable[[int], None] = lambda size: None
) -> None:
    """Writes nested dictionaries, lists and tuples of `Outgoing` tensors and plain values.

    Memory stays at one tensor; `progress` is called with the bytes of every tensor written. Raises
    TypeError for a value that is neither, before anything is written.
    """
    stream = _Stream()
    text = stream.whole(value)
    root = path.stem
    with open(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(f"{root}/data.pkl"), text)
        archive.writestr(zipfile.ZipInfo(f"{root}/byteorder"), b"little")
        for number, tensor in enumerate(stream.tensors):
            name = f"{root}/data/{number}"
            _member(archive, name, _aligned(file.tell(), name), tensor)
            progress(tensor.nbytes)
        archive.writestr(zipfile.ZipInfo(f"{root}/version"), b"3\n")


def _member(archive: zipfile.ZipFile, name: str, extra: bytes, tensor: Outgoing) -> None:
    array = np.ascontiguousarray(tensor.make())
    if array.size != math.prod(tensor.shape) or array.dtype != tensor.dtype:
        found = f"{array.shape} {array.dtype}"
        raise ValueError(f"{name}: {found}, announced {tensor.shape} {tensor.dtype}")
    info = zipfile.ZipInfo(name)
    large = array.nbytes >= zipfile.ZIP64_LIMIT  # then zipfile adds a field, and aligning is moot
    info.extra = b"" if large else extra
    with archive.open(info, "w", force_zip64=large) as member:
        member.write(array.reshape(-1).view(np.uint8).data)


def _aligned(at: int, name: str) -> bytes:
    """An extra field (its name and size take four bytes) so that the data begins aligned."""
    room = -(at + 30 + len(name.encode()) + 4) % ALIGNMENT
    return b"FB" + struct.pack("<H", room) + b"Z" * room


class _Stream:
    """A pickle of protocol 2, without memo: what occurs twice is written twice."""

    def __init__(self) -> None:
        self.out = io.BytesIO()
        self.tensors: list[Outgoing] = []

    def whole(self, value: Any) -> bytes:
        """The stream of one value."""
        self.out.write(b"\x80\x02")
        self.put(value)
        self.out.write(b".")
        return self.out.getvalue()

    def put(self, value: Any) -> None:
        """Pushes a value."""
        if isinstance(value, Outgoing):
            self._tensor(value)
        elif isinstance(value, Mapping):
            self.out.write(b"}(")
            for key, item in value.items():
                self.put(key)
                self.put(item)
            self.out.write(b"u")
        elif isinstance(value, list):
            self.out.write(b"](")
            for item in value:
                self.put(item)
            self.out.write(b"e")
        elif isinstance(value, tuple):
            self._tuple(*value)
        else:
            self.out.write(_plain(value))

    def _tuple(self, *items: Any) -> None:
        self.out.write(b"(")
        for item in items:
            self.put(item)
        self.out.write(b"t")

    def _global(self, module: str, name: str) -> None:
        self.out.write(f"c{module}\n{name}\n".encode())

    def _tensor(self, tensor: Outgoing) -> None:
        """A call of PyTorch's rebuilder: storage, offset, size, stride, gradient, hooks[, type]."""
        untyped = _UNTYPED.get(tensor.dtype)
        if untyped is None and tensor.dtype not in _STORAGES:
            raise TypeError(f"PyTorch has no storage of {tensor.dtype}")
        self._global("torch._utils", f"_rebuild_tensor_v{2 if untyped is None else 3}")
        self.out.write(b"(")
        self._storage(tensor, untyped)
        strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
        for argument in (0, tensor.shape, tuple(strides), False):
            self.put(argument)
        self._global("collections", "OrderedDict")
        self.out.write(b")R")
        if untyped is not None:
            self._global("torch", untyped)
        self.out.write(b"tR")

    def _storage(self, tensor: Outgoing, untyped: str | None) -> None:
        """A persistent id: kind, type, name of the member, device, elements (bytes if untyped)."""
        self.out.write(b"(")
        self.put("storage")
        if untyped is None:
            self._global("torch", _STORAGES[tensor.dtype])
        else:
            self._global("torch.storage", "UntypedStorage")
        for field in (str(len(self.tensors)), "cpu", math.prod(tensor.shape)):
            self.put(field)
        self.out.write(b"tQ")
        self.tensors.append(tensor)


def _plain(value: Any) -> bytes:
    """The opcodes that push a value of a plain type."""
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            text = value.encode()
            return b"X" + struct.pack("<I", len(text)) + text
    raise TypeError(f"a {type(value).__name__} is not written")
