"""Reader for `torch.save` checkpoints, without PyTorch and without unpickling.

A `.pt`/`.pth` file is a zip archive of uncompressed members: a pickle stream that describes the
containers and tensors (`pickles` parses it and executes nothing), and one member of raw bytes per
storage. Tensors stay in the file until `LazyTensor.read`, which reads only their byte range. The
legacy format, a sequence of pickle streams followed by the storages, is read in the same way.

Every tensor is checked against its storage, and every storage against the file, before the first
byte of data is read: no declared size is trusted.
"""

import dataclasses
import functools
import io
import math
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from longlive_jax.interop.pickles import Global, TensorCall, read_pickle, replace_tensor_calls
from longlive_jax.interop.tensors import LazyTensor, pread
from longlive_jax.spec import UserError

__all__ = ["read_torch"]

MAX_PICKLE_BYTES = 128 * 2**20
MAX_MEMBERS = 1_000_000
MAX_AXES = 16
LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

_NUMPY = {
    "float64": np.float64,
    "double": np.float64,
    "float32": np.float32,
    "float": np.float32,
    "float16": np.float16,
    "half": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "long": np.int64,
    "int32": np.int32,
    "int": np.int32,
    "int16": np.int16,
    "short": np.int16,
    "int8": np.int8,
    "char": np.int8,
    "uint8": np.uint8,
    "byte": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
    "complex64": np.complex64,
    "complexfloat": np.complex64,
    "complex128": np.complex128,
    "complexdouble": np.complex128,
}


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A contiguous sequence of elements in a file.

    Attributes:
      key: name of the storage in the file.
      dtype: element type, or None for untyped storages, whose elements are bytes.
      count: number of elements.
      start: first element within the bytes of `key` (for views in the legacy format).
    """

    key: str
    dtype: np.dtype | None
    count: int
    start: int = 0

    @property
    def nbytes(self) -> int:
        return self.count * (self.dtype.itemsize if self.dtype else 1)


def read_torch(path: str | os.PathLike) -> Any:
    """The saved value, usually a nested dictionary, with every tensor as a `LazyTensor`.

    Nothing in the file is ever executed. Raises UserError if the file is not a checkpoint, is
    damaged, or contains anything but tensors and plain containers.
    """
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(len(LEGACY_MAGIC))
    if not head:
        raise UserError(f"{path}: is empty; copy or download the file again")
    if head.startswith(b"PK"):
        return _read_zip(path)
    if head == LEGACY_MAGIC:
        return _read_legacy(path)
    if head.startswith(b"\x80"):
        raise UserError(
            f"{path}: is a bare pickle, not a torch.save checkpoint; only the latter are read"
        )
    raise UserError(
        f"{path}: is not a PyTorch checkpoint (it starts with {bytes(head[:8])!r}); choose a .pt, "
        ".pth or .safetensors file"
    )


def _read_zip(path: Path) -> Any:
    # 1. The pickle stream, and the byte order if the archive names one.
    members = _members(path)
    pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise UserError(
            f"{path}: not a torch.save checkpoint: the zip archive has {len(pickles)} data.pkl "
            "members instead of 1"
        )
    root = pickles[0][: -len("data.pkl")]
    if f"{root}byteorder" in members:
        order = bytes(pread(path, *_bounded(path, members[f"{root}byteorder"], 64)))
        if order.strip() != b"little":
            raise UserError(f"{path}: byte order must be b'little', got {order!r}; save it again")
    stream = io.BytesIO(pread(path, *_bounded(path, members[pickles[0]], MAX_PICKLE_BYTES)))
    # 2. Its value; every storage must be a member that is large enough.
    offsets: dict[str, int] = {}

    def persistent(pid: Any) -> _Storage:
        storage = _storage(pid)
        if f"{root}data/{storage.key}" not in members:
            raise ValueError(f"storage {storage.key!r} is not in the archive")
        offset, size = members[f"{root}data/{storage.key}"]
        if storage.nbytes > size:
            raise ValueError(f"storage {storage.key!r} has {size} of {storage.nbytes} bytes")
        offsets[storage.key] = offset
        return storage

    value = read_pickle(stream, str(path), persistent=persistent)
    return _with_tensors(value, path, lambda storage: offsets[storage.key])


def _bounded(path: Path, span: tuple[int, int], limit: int) -> tuple[int, int]:
    """The span (offset, size), if its size is within the limit; else raises UserError."""
    if span[1] > limit:
        raise UserError(
            f"{path}: metadata of {span[1]} bytes, the limit is {limit}; the file is damaged or "
            "not a checkpoint"
        )
    return span


def _members(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of the data of each member.

    Raises UserError for a damaged archive, and for members that are compressed, encrypted,
    repeated, overlapping or outside the file.
    """
    # 1. The directory of the archive.
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error) as error:
        raise UserError(
            f"{path}: a damaged or truncated zip archive ({error}); copy or download it again"
        ) from error
    if len(infos) > MAX_MEMBERS:
        raise UserError(
            f"{path}: {len(infos)} members, the limit is {MAX_MEMBERS}; not a checkpoint"
        )
    # 2. Its members.
    size, members = path.stat().st_size, {}
    with open(path, "rb") as file:
        for info in infos:
            if info.filename in members:
                raise UserError(f"{path}: member {info.filename!r} appears twice")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise UserError(f"{path}: member {info.filename!r} is compressed or encrypted")
            if info.compress_size != info.file_size:
                raise UserError(f"{path}: member {info.filename!r} has two different sizes")
            start = _data_offset(file, info.header_offset)
            if start is None or start + info.file_size > size:
                raise UserError(f"{path}: member {info.filename!r} is outside the file")
            members[info.filename] = (start, info.file_size)
    _check_no_overlaps(path, members)
    return members


def _data_offset(file: io.BufferedReader, header: int) -> int | None:
    """Offset of a member's data, after its padded local header; None if there is no such header."""
    if header < 0:
        return None
    file.seek(header)
    fixed = file.read(30)
    if len(fixed) < 30 or fixed[:4] != b"PK\x03\x04":
        return None
    name, extra = struct.unpack("<HH", fixed[26:30])
    return header + 30 + name + extra


def _check_no_overlaps(path: Path, members: dict[str, tuple[int, int]]) -> None:
    end, previous = 0, ""
    for name, (start, size) in sorted(members.items(), key=lambda item: item[1]):
        if start < end:
            raise UserError(f"{path}: members {previous!r} and {name!r} overlap")
        end, previous = start + size, name


def _storage(pid: Any) -> _Storage:
    """The storage of a persistent id ('storage', type, key, location, count[, view])."""
    # 1. Type, key and size.
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
        raise ValueError("a persistent id is not a storage")
    _, kind, key, _, count = pid[:5]
    if not isinstance(kind, Global) or not isinstance(key, str) or not _is_size(count):
        raise ValueError("a storage has no type, key or size")
    name = kind.name.rpartition(".")[2].removesuffix("Storage").lower()
    if not kind.name.endswith("Storage") or (name != "untyped" and name not in _NUMPY):
        raise ValueError(f"unknown storage type {kind.name}")
    dtype = None if name == "untyped" else np.dtype(_NUMPY[name])
    # 2. A view of the storage, in the legacy format.
    if len(pid) == 6 and pid[5] is not None:
        view = pid[5]
        if not (isinstance(view, tuple) and len(view) == 3 and all(map(_is_size, view[1:]))):
            raise ValueError("a storage view has no offset or size")
        if view[1] + view[2] > count:
            raise ValueError(f"a view goes beyond the end of storage {key!r}")
        return _Storage(key, dtype, view[2], view[1])
    return _Storage(key, dtype, count)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _with_tensors(value: Any, path: Path, offset_of: Callable[[_Storage], int]) -> Any:
    """The value with every tensor call replaced by a `LazyTensor`."""

    def leaf(call: TensorCall) -> LazyTensor:
        try:
            return _tensor(call, path, offset_of)
        except (ValueError, TypeError, IndexError) as error:
            raise UserError(
                f"{path}: invalid tensor ({error}); copy or download the file again"
            ) from error

    return replace_tensor_calls(value, leaf, str(path))


def _tensor(call: TensorCall, path: Path, offset_of: Callable[[_Storage], int]) -> LazyTensor:
    """The tensor of a rebuild call (storage, offset, shape, strides, ...), which is checked.

    Raises ValueError, TypeError or IndexError if the arguments are malformed or the tensor extends
    beyond its storage.
    """
    # 1. Element type.
    storage, offset, shape, strides = call.args[:4]
    if not isinstance(storage, _Storage):
        raise ValueError("no storage")
    dtype = storage.dtype
    if call.name.endswith("_v3"):
        dtype_name = call.args[6]
        dtype = (
            np.dtype(_NUMPY[dtype_name.name.removeprefix("torch.")])
            if isinstance(dtype_name, Global)
            else None
        )
    if dtype is None:
        raise ValueError("no element type")
    # 2. Shape, strides and offset, counted in elements of the storage.
    sizes_ok = (
        isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
    )
    if not sizes_ok or not all(map(_is_size, (offset, *shape, *strides))) or len(shape) > MAX_AXES:
        raise ValueError("shape, strides and offset must be non-negative integers")
    available = storage.nbytes // dtype.itemsize
    count = math.prod(shape)
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if count else 0
    if offset + span > available or count > available:
        raise ValueError(
            f"shape {shape} at offset {offset} exceeds its storage of {available} elements"
        )
    # 3. Byte range in the file.
    begin = offset_of(storage) + storage.start * (storage.dtype.itemsize if storage.dtype else 1)
    begin += offset * dtype.itemsize
    read = functools.partial(_read, path, begin, span, shape, strides, dtype)
    return LazyTensor(shape, dtype, read)


def _read(path: Path, begin: int, span: int, shape, strides, dtype: np.dtype) -> np.ndarray:
    flat = np.frombuffer(pread(path, begin, span * dtype.itemsize), dtype)
    byte_strides = tuple(s * dtype.itemsize for s in strides)
    return np.ascontiguousarray(np.ndarray(shape, dtype, flat, 0, byte_strides)).reshape(shape)


def _read_legacy(path: Path) -> Any:
    """Reads the legacy format.

    It consists of five pickle streams (magic, version, system, value, storage keys) and the
    storages.
    """
    size = path.stat().st_size
    stream = io.BytesIO(pread(path, 0, min(size, MAX_PICKLE_BYTES)))
    storages: dict[str, _Storage] = {}

    def persistent(pid: Any) -> _Storage:
        storage = _storage(pid)
        base = _Storage(storage.key, storage.dtype, pid[4])
        if storages.setdefault(storage.key, base) != base:
            raise ValueError(f"storage {storage.key!r} has two different declarations")
        return storage

    where = str(path)
    read = functools.partial(read_pickle, stream, where, persistent=persistent)
    _, version, system = read(), read(), read()
    if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UserError(
            f"{path}: unknown variant of the legacy torch.save format; save it again with a "
            "current PyTorch"
        )
    value, keys = read(), read()
    offsets = _legacy_offsets(path, stream.tell(), keys, storages)
    return _with_tensors(value, path, lambda storage: offsets[storage.key])


def _legacy_offsets(
    path: Path, begin: int, keys: Any, storages: dict[str, _Storage]
) -> dict[str, int]:
    """Offset of each storage's elements, which follow their count (int64); `begin`: the first."""
    if (
        not isinstance(keys, list)
        or set(map(str, keys)) != set(storages)
        or len(keys) != len(storages)
    ):
        raise UserError(
            f"{path}: its list of storages does not match its tensors; copy or download it again"
        )
    offsets, size = {}, path.stat().st_size
    for key in keys:
        if begin + 8 > size:
            raise UserError(f"{path}: ends before storage {key!r}; copy or download it again")
        (count,) = struct.unpack("<q", pread(path, begin, 8))
        if count != storages[key].count or begin + 8 + storages[key].nbytes > size:
            raise UserError(f"{path}: storage {key!r} is truncated; copy or download it again")
        offsets[key] = begin + 8
        begin += 8 + storages[key].nbytes
    return offsets
