"""Arrays of one Orbax tree on disk, written and read slice by slice.

Orbax writes the tree structure; TensorStore, its storage layer, then writes the arrays layer by
layer. Passing complete arrays to Orbax needs 2.7 times the memory of the largest one: 6.6 GiB for
the 5B DiT in bfloat16, 13 GiB in float32 (measured with Orbax 0.12.8 on a 1 GiB array, NumPy or
JAX, with `partial.save` of its experimental v1 API). Written by layers, the conversion of a
3.2 GiB checkpoint peaked at 1.6 GiB (`longlive_jax.bench.convert_memory`, 10 layers). The files
use Orbax's stable format, and Orbax can read them without this module.

Orbax does not detect a flipped bit, so every array has a fingerprint: dtype, shape and CRC-32.
"""

import dataclasses
import math
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import ml_dtypes
import numpy as np
import tensorstore as ts

from longlive_jax.spec import UserError

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

__all__ = ["ArrayReader", "ArraySpec", "ArrayWriter", "Shape", "TreePath", "flatten", "nest"]

CHUNK_BYTES = 64 * 2**20
"""Largest zarr chunk."""
COMMIT_BYTES = 256 * 2**20
"""Bytes written before a transaction is committed."""
READ_AHEAD_BYTES = 512 * 2**20
"""Bytes of arrays that `read_many` reads ahead of its consumer; a single array may be larger."""
READERS = 4
"""Threads of `read_many`."""
ALIGNMENT = 64
"""Alignment in bytes of arrays that were read: XLA's CPU backend takes such memory as it is."""

TreePath = tuple[str, ...]
"""Keys from the root of a parameter tree to an array: `("blocks", "ffn", "up", "kernel")`."""
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape and element type of an array, without its values."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def flatten(tree: Mapping[Any, Any], prefix: TreePath = ()) -> dict[TreePath, Any]:
    """Leaves of nested dictionaries by path.

    Integer keys, which NNX uses for lists of modules, become strings.
    """
    flat: dict[TreePath, Any] = {}
    for key, value in tree.items():
        path = (*prefix, str(key))
        flat |= flatten(value, path) if isinstance(value, Mapping) else {path: value}
    return flat


def nest(flat: Mapping[TreePath, Any]) -> dict[Any, Any]:
    """Nested dictionaries from leaves by path: the inverse of `flatten`.

    Decimal keys become integers again.
    """
    tree: dict[Any, Any] = {}
    for path, value in flat.items():
        node = tree
        *parents, last = (int(key) if key.isdecimal() else key for key in path)
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


class ArrayWriter:
    """Writes the arrays of one Orbax tree, slice by slice along the leading axis.

    Writes are collected in a transaction, which is committed every `COMMIT_BYTES` and by `flush`.
    Memory is bounded by `COMMIT_BYTES` plus one slice; hundreds of small arrays need one commit.
    """

    def __init__(self, folder: Path, specs: Mapping[TreePath, ArraySpec]):
        self.folder, self.specs = folder, dict(specs)
        self.fingerprints: dict[str, str] = {".".join(path): "" for path in specs}
        self._transaction, self._pending = ts.Transaction(), 0
        seed = nest(dict.fromkeys(specs, np.zeros((), np.int8)))
        with _checkpointer() as checkpointer:
            checkpointer.save(folder.absolute(), _text_keys(seed))
        # Only object stores need this marker, and it contains a path of this machine.
        (folder / "commit_success.txt").unlink(missing_ok=True)

    def write(self, path: TreePath, slices: Iterable[np.ndarray], *, stacked: bool) -> None:
        """Writes an array from its layers (`stacked`), or from a single slice that is all of it.

        Raises ValueError if the slices do not fit the array's spec in shape, dtype or number.
        """
        spec = self.specs[path]
        store = _create(self.folder, path, spec, self._transaction, stacked=stacked)
        checksum = count = 0
        for value in slices:
            shape = spec.shape[1:] if stacked else spec.shape
            if value.shape != shape or value.dtype != spec.dtype:
                got = f"got {value.shape} {value.dtype}"
                raise ValueError(f"{path}: {got}, expected {shape} {spec.dtype}")
            value = np.asarray(value, order="C")
            checksum = zlib.crc32(_bytes(value), checksum)
            for index, block in _row_blocks(store, value, count if stacked else None):
                store[index].write(block).result()
                self._pending += block.nbytes
                if self._pending >= COMMIT_BYTES:
                    self.flush()
                    store = _reopen(self.folder, path, spec, self._transaction)
            count += 1
        expected = spec.shape[0] if stacked else 1
        if count != expected:
            raise ValueError(f"{path}: got {count} slices, expected {expected} for {spec.shape}")
        self.fingerprints[".".join(path)] = _fingerprint(spec.shape, spec.dtype, checksum)

    def flush(self) -> None:
        """Commits the transaction: everything written so far becomes readable."""
        self._transaction.commit_sync()
        self._transaction, self._pending = ts.Transaction(), 0


def _checkpointer() -> "ocp.Checkpointer":
    """A checkpointer for this process only: in a multi-process run, one process writes."""
    import orbax.checkpoint as ocp  # a reader does without this import of 0.1 s

    process = jax.process_index()
    options = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _fingerprint(shape: tuple[int, ...], dtype: np.dtype, checksum: int) -> str:
    return f"{dtype.name}[{','.join(map(str, shape))}]:{checksum:08x}"


def _parse(fingerprint: str) -> tuple[ArraySpec, str]:
    dtype, rest = fingerprint.split("[", 1)
    sizes, checksum = rest.split("]:", 1)
    shape = tuple(int(n) for n in sizes.split(",") if n)
    return ArraySpec(shape, np.dtype(getattr(ml_dtypes, dtype, dtype))), checksum


def _row_blocks(
    store: Any, value: np.ndarray, layer: int | None
) -> Iterator[tuple[tuple, np.ndarray]]:
    """Index in the array and values: all of a slice, or blocks of rows if it is too large."""
    lead = () if layer is None else (layer,)
    if value.nbytes <= COMMIT_BYTES or value.ndim == 0:
        yield lead, value
        return
    rows = store.chunk_layout.write_chunk.shape[len(lead)]
    for start in range(0, value.shape[0], rows):
        end = min(start + rows, value.shape[0])  # unlike NumPy, TensorStore does not clip slices
        yield (*lead, slice(start, end)), value[start:end]


def _kvstore(folder: Path, path: TreePath) -> dict[str, Any]:
    base = f"file://{folder.absolute()}/"
    return {"driver": "ocdbt", "base": base, "path": ".".join(path) + "/"}


def _create(
    folder: Path, path: TreePath, spec: ArraySpec, transaction: ts.Transaction, *, stacked: bool
) -> Any:
    """Replaces the placeholder with an array of the right shape, within the transaction."""
    # 1. Chunks: one layer each, or blocks of rows if a layer is larger than `CHUNK_BYTES`.
    chunks = list(spec.shape)
    row_axis = 1 if stacked else 0
    if stacked:
        chunks[0] = 1
    if len(chunks) > row_axis:
        row_bytes = max(math.prod(chunks[row_axis + 1 :]) * spec.dtype.itemsize, 1)
        chunks[row_axis] = max(1, min(chunks[row_axis], CHUNK_BYTES // row_bytes))
    # 2. The zarr array.
    layout = {
        "driver": "zarr",
        "kvstore": _kvstore(folder, path),
        "dtype": spec.dtype.name,
        "metadata": {
            "shape": list(spec.shape),
            "chunks": chunks,
            "compressor": {"id": "zstd", "level": 1},
        },
        # Chunks of zeros must exist too: Orbax treats an array with missing chunks as incomplete.
        "store_data_equal_to_fill_value": True,
    }
    opened = ts.open(layout, create=True, delete_existing=True, transaction=transaction)
    return opened.result()


def _reopen(folder: Path, path: TreePath, spec: ArraySpec, transaction: Any = None) -> Any:
    layout = {
        "driver": "zarr",
        "kvstore": _kvstore(folder, path),
        "dtype": spec.dtype.name,
        "schema": {"domain": {"shape": list(spec.shape)}},
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(layout, open=True, transaction=transaction).result()


def _text_keys(tree: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(k): _text_keys(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An uninitialized array whose memory begins at a multiple of `ALIGNMENT`."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


class ArrayReader:
    """Reads the arrays of one tree, completely or by layer, and verifies their fingerprints."""

    def __init__(self, folder: Path, fingerprints: Mapping[str, str]):
        self.folder = folder
        self._checksums: dict[TreePath, str] = {}
        self.specs: dict[TreePath, ArraySpec] = {}
        for name, fingerprint in fingerprints.items():
            path = tuple(name.split("."))
            try:
                self.specs[path], self._checksums[path] = _parse(fingerprint)
            except (ValueError, TypeError, AttributeError) as error:
                raise UserError(f"{folder}: unreadable fingerprint of {name}") from error

    def read(self, path: TreePath, layer: int | None = None) -> np.ndarray:
        """An array, or its slice `layer` along the leading axis.

        Raises UserError if the array is missing, unreadable, or does not match its fingerprint
        (a single slice is not verified).
        """
        spec = self.specs[path]
        value = _aligned(spec.shape if layer is None else spec.shape[1:], spec.dtype)
        try:
            store = _reopen(self.folder, path, spec)
            ts.array(value).write(store if layer is None else store[layer]).result()
        except (ValueError, OSError) as error:
            detail = str(error).splitlines()[0][:160]
            raise UserError(
                f"{self.folder}: {'.'.join(path)} is missing or damaged ({detail}); convert the "
                "checkpoint again"
            ) from error
        if layer is None:
            self._verify(path, zlib.crc32(_bytes(value)))
        return value

    def read_many(
        self, paths: Iterable[TreePath], *, ahead: int = READ_AHEAD_BYTES
    ) -> Iterator[tuple[TreePath, np.ndarray]]:
        """Yields arrays in order while threads read and verify the next ones.

        At most `ahead` bytes, or a single array, are read beyond the array handed out last. Raises
        UserError as `read` does.
        """
        remaining = deque(paths)
        in_flight: deque[tuple[TreePath, Future[np.ndarray]]] = deque()
        pending = 0
        with ThreadPoolExecutor(READERS) as readers:
            try:
                while remaining or in_flight:
                    # 1. Start reads.
                    while remaining and (
                        not in_flight or pending + self.specs[remaining[0]].nbytes <= ahead
                    ):
                        path = remaining.popleft()
                        pending += self.specs[path].nbytes
                        in_flight.append((path, readers.submit(self.read, path)))
                    # 2. Hand out the oldest.
                    path, future = in_flight.popleft()
                    pending -= self.specs[path].nbytes
                    yield path, future.result()
            finally:
                readers.shutdown(wait=False, cancel_futures=True)

    def layers(self, path: TreePath) -> Iterator[np.ndarray]:
        """The slices of an array along its leading axis, verified after the last one."""
        checksum = 0
        for layer in range(self.specs[path].shape[0]):
            value = np.asarray(self.read(path, layer), order="C")
            checksum = zlib.crc32(_bytes(value), checksum)
            yield value
        self._verify(path, checksum)

    def _verify(self, path: TreePath, checksum: int) -> None:
        if f"{checksum:08x}" != self._checksums[path]:
            raise UserError(
                f"{self.folder}: {'.'.join(path)} has changed on disk (its checksum is "
                f"{checksum:08x} instead of {self._checksums[path]}); convert the checkpoint again"
            )
