"""safetensors files, single or sharded: lazily read, and written in a stream.

The `safetensors` library judges every file (its header, sizes and overlaps). The bytes are read by
range here, because the library maps files into memory and a map counts as resident: converting
20 GB would look like, and on small machines behave like, 20 GB. For the same reason shards are
written tensor by tensor, where the library wants all tensors of a shard at once.
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

__all__ = ["Outgoing", "read_index", "read_safetensors", "write_safetensors"]

DTYPES = {
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
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100 * 2**20
DEFAULT_SHARD_BYTES = 5 * 10**9


def read_safetensors(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """The tensors of one file; UserError if it is damaged."""
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            known = set(file.keys())
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: a damaged safetensors file ({error}); download it again"
        ) from error
    (length,) = struct.unpack("<Q", pread(path, 0, 8))
    if length > MAX_HEADER_BYTES:
        raise UserError(f"{path}: a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
    header, twice = _header(pread(path, 8, length), path)
    if twice or set(header) != known:
        raise UserError(f"{path}: tensors named twice: {', '.join(sorted(twice)[:8])}")
    return {name: _lazy(path, 8 + length, name, entry) for name, entry in header.items()}


def _header(text: bytearray, path: Path) -> tuple[dict, list[str]]:
    twice: list[str] = []

    def unique(pairs: list[tuple[str, object]]) -> dict:
        counts = collections.Counter(key for key, _ in pairs)
        twice.extend(key for key, count in counts.items() if count > 1)
        return dict(pairs)

    try:
        header = json.loads(bytes(text), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: an unreadable safetensors header ({error})") from error
    header.pop("__metadata__", None)
    return header, twice


def _lazy(path: Path, base: int, name: str, entry: dict) -> LazyTensor:
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{path}: {name} has element type {entry['dtype']}, which is not read")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{path}: {name} has {end - begin} bytes for {shape} of {dtype}")
    return LazyTensor(shape, dtype, functools.partial(_read, path, base + begin, shape, dtype))


def _read(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    data = pread(path, offset, math.prod(shape) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape)


def read_index(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """The tensors of a sharded checkpoint, given its `*.safetensors.index.json`.

    Every missing shard, and every tensor that is missing, unlisted, or in two shards, is named in
    one UserError.
    """
    path = Path(path)
    try:
        index = json.loads(path.read_text())
        listed: dict[str, str] = dict(index["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a safetensors index ({error!r})") from error
    shards = sorted(set(map(str, listed.values())))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise UserError(f"{path}: names shards outside its folder: {', '.join(outside[:4])}")
    absent = [shard for shard in shards if not (path.parent / shard).is_file()]
    problems = [f"{len(absent)} missing shards: {_some(absent)}"] if absent else []
    tensors, twice = _gather(path.parent / s for s in shards if s not in absent)
    lost = [k for k, s in listed.items() if k not in tensors and s not in absent]
    unlisted = [k for k in tensors if k not in listed]
    for found, what in ((lost, "missing"), (unlisted, "unlisted"), (twice, "duplicate")):
        if found:
            problems.append(f"{len(found)} {what} tensors: {_some(found)}")
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems))
    return tensors


def _gather(shards: Iterable[Path]) -> tuple[dict[str, LazyTensor], list[str]]:
    tensors: dict[str, LazyTensor] = {}
    twice: list[str] = []
    for shard in shards:
        for name, tensor in read_safetensors(shard).items():
            if name in tensors:
                twice.append(name)
            tensors[name] = tensor
    return tensors, twice


def _some(names: list[str], limit: int = 8) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """A tensor to be written: shape, type, and a function that makes it in its turn."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Outgoing],
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[int], None] = lambda size: None,
) -> list[Path]:
    """Writes `stem.safetensors`, or numbered shards with an index if one file would be too large.

    Memory stays at one tensor. `progress` is called with the bytes of every tensor written.
    """
    shards: list[dict[str, Outgoing]] = [{}]
    for name, tensor in tensors.items():
        full = sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes
        if full and shards[-1]:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        path = folder / f"{stem}.safetensors"
        _write_one(path, shards[0], progress)
        return [path]
    paths: list[Path] = []
    placed: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        path = folder / f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_one(path, shard, progress)
        paths.append(path)
        placed |= dict.fromkeys(shard, path.name)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return paths


def _write_one(
    path: Path, tensors: Mapping[str, Outgoing], progress: Callable[[int], None]
) -> None:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        span = [at, at + tensor.nbytes]
        shape = list(tensor.shape)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": span}
        at = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            data = np.ascontiguousarray(tensor.make())
            file.write(data.reshape(-1).view(np.uint8).data)
            progress(tensor.nbytes)
