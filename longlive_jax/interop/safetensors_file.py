"""safetensors files, single or sharded: read lazily and written tensor by tensor.

The `safetensors` library is only used to validate files (header, sizes and overlaps). Tensors are
read here by byte range, because the library memory-maps files and mapped pages count as resident
memory: converting 20 GB would need 20 GB. Shards are written here tensor by tensor, because the
library needs all tensors of a shard in memory.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from longlive_jax.interop.tensors import LazyTensor, pread
from longlive_jax.spec import UserError

__all__ = ["OutputTensor", "read_index", "read_metadata", "read_safetensors", "write_safetensors"]

SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
MAX_HEADER_BYTES = 100 * 2**20
DEFAULT_SHARD_BYTES = 5 * 10**9


def read_safetensors(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """The tensors of one file by name; raises UserError if the file is damaged."""
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            known = set(file.keys())
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: damaged safetensors file ({error}); copy or download it again"
        ) from error
    (length,) = struct.unpack("<Q", pread(path, 0, 8))
    if length > MAX_HEADER_BYTES:
        raise UserError(
            f"{path}: safetensors header of {length} bytes, the limit is {MAX_HEADER_BYTES}; copy "
            "or download the file again"
        )
    header, duplicates = _header(pread(path, 8, length), path)
    if duplicates or set(header) != known:
        raise UserError(
            f"{path}: duplicate tensors: {_summary(sorted(duplicates))}; copy or download the file "
            "again"
        )
    return {name: _lazy(path, 8 + length, name, entry) for name, entry in header.items()}


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of one file; raises UserError if the file is damaged."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: damaged safetensors file ({error}); copy or download it again"
        ) from error


def _header(text: bytearray, path: Path) -> tuple[dict, list[str]]:
    """The JSON header without metadata, and the keys that occur more than once."""
    duplicates: list[str] = []

    def collect(pairs: list[tuple[str, object]]) -> dict:
        counts = collections.Counter(key for key, _ in pairs)
        duplicates.extend(key for key, count in counts.items() if count > 1)
        return dict(pairs)

    try:
        header = json.loads(bytes(text), object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: unreadable safetensors header ({error}); copy or download the file again"
        ) from error
    header.pop("__metadata__", None)
    return header, duplicates


def _lazy(path: Path, base: int, name: str, entry: dict) -> LazyTensor:
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise UserError(
            f"{path}: {name} has dtype {entry['dtype']}; supported: {', '.join(SAFETENSORS_DTYPES)}"
        )
    dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise UserError(
            f"{path}: {name} has {end - begin} bytes, expected "
            f"{math.prod(shape) * dtype.itemsize} for {shape} {dtype}; copy or download the file "
            "again"
        )
    return LazyTensor(shape, dtype, functools.partial(_read, path, base + begin, shape, dtype))


def _read(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    data = pread(path, offset, math.prod(shape) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape)


def read_index(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """The tensors of a sharded checkpoint by name, given its `*.safetensors.index.json`.

    Raises one UserError that names all missing shards and all tensors that are missing, unlisted,
    or in two shards.
    """
    # 1. Read the index. Shards must be in its folder.
    path = Path(path)
    try:
        index = json.loads(path.read_text())
        listed: dict[str, str] = dict(index["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a safetensors index ({error!r}); copy or download it again"
        ) from error
    shards = sorted(set(map(str, listed.values())))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise UserError(
            f"{path}: names shards outside its folder ({', '.join(outside[:4])}); put all shards "
            "next to the index"
        )
    absent = [shard for shard in shards if not (path.parent / shard).is_file()]
    problems = [f"{len(absent)} missing shards: {_summary(absent)}"] if absent else []
    # 2. Read the shards, and collect all problems.
    tensors, duplicate = _read_shards(path.parent / s for s in shards if s not in absent)
    missing = [k for k, s in listed.items() if k not in tensors and s not in absent]
    unlisted = [k for k in tensors if k not in listed]
    for names, kind in ((missing, "missing"), (unlisted, "unlisted"), (duplicate, "duplicate")):
        if names:
            problems.append(f"{len(names)} {kind} tensors: {_summary(names)}")
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems) + "; copy or download the files again")
    return tensors


def _read_shards(shards: Iterable[Path]) -> tuple[dict[str, LazyTensor], list[str]]:
    """The tensors of all shards by name, and the names that several shards have."""
    tensors: dict[str, LazyTensor] = {}
    duplicates: list[str] = []
    for shard in shards:
        for name, tensor in read_safetensors(shard).items():
            if name in tensors:
                duplicates.append(name)
            tensors[name] = tensor
    return tensors, duplicates


def _summary(names: list[str], limit: int = 8) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


@dataclasses.dataclass(frozen=True)
class OutputTensor:
    """A tensor to write, computed only when its turn comes.

    Attributes:
      shape: shape of the tensor.
      dtype: element type.
      make: function that computes the values.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    folder: Path,
    stem: str,
    tensors: Mapping[str, OutputTensor],
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda size: None,
) -> list[Path]:
    """Writes `stem.safetensors`, or numbered shards and an index if one file would be too large.

    Memory is bounded by one tensor.

    Args:
      folder: folder to write to.
      stem: file name without shard number and suffix.
      tensors: tensors by name.
      shard_bytes: largest total size of a shard's tensors; a larger tensor gets its own shard.
      metadata: texts by name, for the header of every file.
      progress: called with the size in bytes of each tensor once it is written.

    Returns:
      The files that contain tensors, without the index.
    """
    # 1. Assign tensors to shards.
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        path = folder / f"{stem}.safetensors"
        _write_file(path, shards[0], metadata or {}, progress)
        return [path]
    # 2. Write the shards and the index.
    paths: list[Path] = []
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        path = folder / f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_file(path, shard, metadata or {}, progress)
        paths.append(path)
        weight_map |= dict.fromkeys(shard, path.name)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return paths


def _shards(tensors: Mapping[str, OutputTensor], shard_bytes: int) -> list[dict[str, OutputTensor]]:
    """The tensors in order, in groups of at most `shard_bytes`."""
    shards: list[dict[str, OutputTensor]] = [{}]
    for name, tensor in tensors.items():
        is_full = sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes
        if is_full and shards[-1]:
            shards.append({})
        shards[-1][name] = tensor
    return shards


def _write_file(
    path: Path,
    tensors: Mapping[str, OutputTensor],
    metadata: Mapping[str, str],
    progress: Callable[[int], None],
) -> None:
    header: dict[str, dict] = {"__metadata__": {"format": "pt", **metadata}}
    begin = 0
    for name, tensor in tensors.items():
        span = [begin, begin + tensor.nbytes]
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": span}
        begin = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data to 8 bytes
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            data = np.ascontiguousarray(tensor.make())
            file.write(data.reshape(-1).view(np.uint8).data)
            progress(tensor.nbytes)
