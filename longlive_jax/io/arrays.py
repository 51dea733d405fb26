"""Arrays of one Orbax tree on disk, written and read slice by slice.

Orbax writes the tree; TensorStore, Orbax's storage layer, then fills its arrays layer by layer.
Handing whole arrays to Orbax costs 2.7 times the largest one in memory (measured with 0.12.8 on
1 GiB, by `partial.save` of the experimental v1 API and from NumPy as from JAX arrays alike), which
would be 6.6 GiB for the 5B DiT in bfloat16 and 13 GiB in float32. Filled in layers, a whole
conversion of 3.2 GiB peaked at 1.6 GiB (`longlive_jax.bench.convert_memory`, ten layers). That
leaves no use for v1: the tree is written with Orbax's stable API, and Orbax alone can read it.
Orbax does not notice a flipped bit, so every array has a fingerprint: its type, shape and CRC-32.
"""

import dataclasses
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from longlive_jax.spec import UserError

__all__ = ["ArrayFiller", "ArrayReader", "ArraySpec", "flatten", "nest"]

CHUNK_BYTES = 64 * 2**20
COMMIT_BYTES = 256 * 2**20

Path = tuple[str, ...]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape and element type of an array that is not here yet."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


def flatten(tree: Mapping[Any, Any], prefix: Path = ()) -> dict[Path, Any]:
    """Leaves of nested dictionaries by path; integer keys (lists of modules) become strings."""
    flat: dict[Path, Any] = {}
    for key, value in tree.items():
        path = (*prefix, str(key))
        flat |= flatten(value, path) if isinstance(value, Mapping) else {path: value}
    return flat


def nest(flat: Mapping[Path, Any]) -> dict[Any, Any]:
    """The inverse of `flatten`: whole numbers become integer keys again, as NNX has them."""
    tree: dict[Any, Any] = {}
    for path, value in flat.items():
        node = tree
        *parents, last = (int(key) if key.isdecimal() else key for key in path)
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


class ArrayFiller:
    """Fills the arrays of one Orbax tree, slice by slice along the leading axis.

    Writes gather in a transaction that is committed every `COMMIT_BYTES` and by `flush`: memory is
    bounded by that and by one slice, and hundreds of small arrays cost one commit.
    """

    def __init__(self, folder: FilePath, specs: Mapping[Path, ArraySpec]):
        self.folder, self.specs = folder, dict(specs)
        self.fingerprints: dict[str, str] = {".".join(path): "" for path in specs}
        self._transaction, self._pending = ts.Transaction(), 0
        seed = nest(dict.fromkeys(specs, np.zeros((), np.int8)))
        with _checkpointer() as checkpointer:
            checkpointer.save(folder.absolute(), _text_keys(seed))
        # Only object stores need this marker, and it holds the path of this machine.
        (folder / "commit_success.txt").unlink(missing_ok=True)

    def fill(self, path: Path, pieces: Iterable[np.ndarray], *, stacked: bool) -> None:
        """Writes an array from its layers (`stacked`) or from one piece.

        Raises ValueError if pieces do not add up to the announced array.
        """
        spec = self.specs[path]
        store = _create(self.folder, path, spec, self._transaction, stacked=stacked)
        checksum = count = 0
        for piece in pieces:
            want = spec.shape[1:] if stacked else spec.shape
            if piece.shape != want or piece.dtype != spec.dtype:
                found = f"{piece.shape} {piece.dtype}"
                raise ValueError(f"{path}: {found}, announced {want} {spec.dtype}")
            piece = np.asarray(piece, order="C")
            checksum = zlib.crc32(_bytes(piece), checksum)
            for where, part in _parts(store, piece, count if stacked else None):
                store[where].write(part).result()
                self._pending += part.nbytes
                if self._pending >= COMMIT_BYTES:
                    self.flush()
                    store = _reopen(self.folder, path, spec, self._transaction)
            count += 1
        if count != (spec.shape[0] if stacked else 1):
            raise ValueError(f"{path}: {count} pieces for shape {spec.shape}")
        self.fingerprints[".".join(path)] = _fingerprint(spec.shape, spec.dtype, checksum)

    def flush(self) -> None:
        """Makes everything filled so far readable."""
        self._transaction.commit_sync()
        self._transaction, self._pending = ts.Transaction(), 0


def _checkpointer() -> ocp.Checkpointer:
    """Of this process alone: of a run in several, one writes and the others need not know."""
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _fingerprint(shape: tuple[int, ...], dtype: np.dtype, checksum: int) -> str:
    return f"{dtype.name}[{','.join(map(str, shape))}]:{checksum:08x}"


def _parse(fingerprint: str) -> tuple[ArraySpec, str]:
    dtype, rest = fingerprint.split("[", 1)
    sizes, checksum = rest.split("]:", 1)
    shape = tuple(int(n) for n in sizes.split(",") if n)
    return ArraySpec(shape, np.dtype(getattr(ml_dtypes, dtype, dtype))), checksum


def _parts(store: Any, piece: np.ndarray, layer: int | None) -> Iterator[tuple[tuple, np.ndarray]]:
    """Where in the array, and what: a whole piece, or rows of one that is too large."""
    lead = () if layer is None else (layer,)
    if piece.nbytes <= COMMIT_BYTES or piece.ndim == 0:
        yield lead, piece
        return
    rows = store.chunk_layout.write_chunk.shape[len(lead)]
    for at in range(0, piece.shape[0], rows):
        end = min(at + rows, piece.shape[0])  # TensorStore does not clip slices as NumPy does
        yield (*lead, slice(at, end)), piece[at:end]


def _kvstore(folder: FilePath, path: Path) -> dict[str, Any]:
    base = f"file://{folder.absolute()}/"
    return {"driver": "ocdbt", "base": base, "path": ".".join(path) + "/"}


def _create(
    folder: FilePath, path: Path, spec: ArraySpec, transaction: ts.Transaction, *, stacked: bool
) -> Any:
    """Replaces the placeholder by an array of the right shape, within the transaction."""
    chunks = list(spec.shape)
    rows = 1 if stacked else 0  # the axis that is cut when a layer alone is too large
    if stacked:
        chunks[0] = 1
    if len(chunks) > rows:
        row_bytes = max(math.prod(chunks[rows + 1 :]) * spec.dtype.itemsize, 1)
        chunks[rows] = max(1, min(chunks[rows], CHUNK_BYTES // row_bytes))
    layout = {
        "driver": "zarr",
        "kvstore": _kvstore(folder, path),
        "dtype": spec.dtype.name,
        "metadata": {
            "shape": list(spec.shape),
            "chunks": chunks,
            "compressor": {"id": "zstd", "level": 1},
        },
        # an all-zero chunk must exist, or Orbax takes the array for incomplete
        "store_data_equal_to_fill_value": True,
    }
    opened = ts.open(layout, create=True, delete_existing=True, transaction=transaction)
    return opened.result()


def _reopen(folder: FilePath, path: Path, spec: ArraySpec, transaction: Any = None) -> Any:
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


class ArrayReader:
    """Reads the arrays of one tree, whole or by layer, given their fingerprints."""

    def __init__(self, folder: FilePath, fingerprints: Mapping[str, str]):
        self.folder = folder
        self._checksums: dict[Path, str] = {}
        self.specs: dict[Path, ArraySpec] = {}
        for name, fingerprint in fingerprints.items():
            path = tuple(name.split("."))
            try:
                self.specs[path], self._checksums[path] = _parse(fingerprint)
            except (ValueError, TypeError, AttributeError) as error:
                raise UserError(f"{folder}: unreadable fingerprint of {name}") from error

    def read(self, path: Path, layer: int | None = None) -> np.ndarray:
        """An array, or one slice of it along the leading axis. Only whole arrays are verified."""
        spec = self.specs[path]
        try:
            store = _reopen(self.folder, path, spec)
            value = np.asarray((store if layer is None else store[layer]).read().result())
        except (ValueError, OSError) as error:
            detail = str(error).splitlines()[0][:160]
            raise UserError(
                f"{self.folder}: {'.'.join(path)} is missing or damaged ({detail}); convert again"
            ) from error
        if layer is None:
            self._verify(path, zlib.crc32(_bytes(value)))
        return value

    def layers(self, path: Path) -> Iterator[np.ndarray]:
        """The slices of an array along its leading axis; verified when the last one is taken."""
        checksum = 0
        for layer in range(self.specs[path].shape[0]):
            value = np.asarray(self.read(path, layer), order="C")
            checksum = zlib.crc32(_bytes(value), checksum)
            yield value
        self._verify(path, checksum)

    def _verify(self, path: Path, checksum: int) -> None:
        if f"{checksum:08x}" != self._checksums[path]:
            raise UserError(f"{self.folder}: {'.'.join(path)} has changed on disk; convert again")
