"""Writer for `torch.save` checkpoints of plain containers and tensors, without PyTorch.

The file is a zip archive of uncompressed members: a pickle stream of a few opcodes, which are
written here directly, and the bytes of one storage per tensor. `torch.load(weights_only=True)` and
`torch_file.read_torch` can read it. The bytes do not depend on when or where it is written.
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

from longlive_jax.interop.safetensors_file import OutputTensor

__all__ = ["write_torch"]

ALIGNMENT = 64
"""Alignment in bytes of a tensor's data in the file, the same as PyTorch's."""

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
"""Dtypes that PyTorch added after typed storages; they use untyped ones."""


def write_torch(
    path: Path, value: Mapping[str, Any], *, progress: Callable[[int], None] = lambda size: None
) -> None:
    """Writes nested dictionaries, lists and tuples of `OutputTensor` and plain values.

    Memory is bounded by one tensor.

    Args:
      path: file to write.
      value: contents of the checkpoint.
      progress: callback with the size in bytes of every tensor that was written.

    Raises TypeError for a value of any other type, before anything is written.
    """
    stream = _PickleStream()
    text = stream.encode(value)
    root = path.stem
    with open(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(f"{root}/data.pkl"), text)
        archive.writestr(zipfile.ZipInfo(f"{root}/byteorder"), b"little")
        for index, tensor in enumerate(stream.tensors):
            name = f"{root}/data/{index}"
            _write_member(archive, name, _alignment_field(file.tell(), name), tensor)
            progress(tensor.nbytes)
        archive.writestr(zipfile.ZipInfo(f"{root}/version"), b"3\n")


def _write_member(archive: zipfile.ZipFile, name: str, extra: bytes, tensor: OutputTensor) -> None:
    array = np.ascontiguousarray(tensor.make())
    if array.size != math.prod(tensor.shape) or array.dtype != tensor.dtype:
        got = f"got {array.shape} {array.dtype}"
        raise ValueError(f"{name}: {got}, expected {tensor.shape} {tensor.dtype}")
    info = zipfile.ZipInfo(name)
    is_large = array.nbytes >= zipfile.ZIP64_LIMIT  # zipfile then adds a field: no alignment
    info.extra = b"" if is_large else extra
    with archive.open(info, "w", force_zip64=is_large) as member:
        member.write(array.reshape(-1).view(np.uint8).data)


def _alignment_field(header: int, name: str) -> bytes:
    """An extra field (its id and size take 4 bytes) that aligns the data after the header."""
    padding = -(header + 30 + len(name.encode()) + 4) % ALIGNMENT
    return b"FB" + struct.pack("<H", padding) + b"Z" * padding


class _PickleStream:
    """A pickle of protocol 2 without memo: repeated values are written repeatedly."""

    def __init__(self) -> None:
        self.out = io.BytesIO()
        self.tensors: list[OutputTensor] = []

    def encode(self, value: Any) -> bytes:
        """The complete stream of one value."""
        self.out.write(b"\x80\x02")
        self.put(value)
        self.out.write(b".")
        return self.out.getvalue()

    def put(self, value: Any) -> None:
        """Writes the opcodes that push a value."""
        if isinstance(value, OutputTensor):
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

    def _tensor(self, tensor: OutputTensor) -> None:
        """Writes a call of `_rebuild_tensor`.

        Its arguments are storage, offset, size, stride, requires_grad, hooks[, dtype].
        """
        untyped = _UNTYPED.get(tensor.dtype)
        if untyped is None and tensor.dtype not in _STORAGES:
            raise TypeError(f"PyTorch has no storage of {tensor.dtype}; convert to another dtype")
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

    def _storage(self, tensor: OutputTensor, untyped: str | None) -> None:
        """Writes a persistent id: kind, type, member, device, elements (bytes if untyped)."""
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
    """The opcodes that push a value of a plain type; TypeError for any other type."""
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
    raise TypeError(
        f"a {type(value).__name__} cannot be written; use tensors, plain values and containers"
    )
