"""Input pipeline to the devices: prefetched batches, of which each process loads its own rows."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.parallel.mesh import BATCH, SP


def process_rows(mesh: Mesh, rows: int) -> range:
    """The rows of a batch of `rows` that this process's devices hold; they are consecutive.

    They follow from the positions of the devices in the mesh, not from the process index: processes
    that shard the same sequences need the same rows.
    """
    return _addressable_range(NamedSharding(mesh, P(BATCH)), rows)


def total_skipped(skipped: int, first: int) -> int:
    """Number of samples skipped by the job, from this process's count for its rows from `first` on.

    Processes with the same rows read the same samples, so only the largest of their counts is
    added. All processes must call it.
    """
    if jax.process_count() == 1:
        return skipped
    largest: dict[int, int] = {}
    for row, count in multihost_utils.process_allgather(np.array([first, skipped])):
        largest[int(row)] = max(largest.get(int(row), 0), int(count))
    return sum(largest.values())


def device_put_batch(batch: Any, specs: Any, mesh: Mesh, *, rows: int, first: int = 0) -> Any:
    """Global arrays over the mesh, from this process's rows of a batch, which start at `first`.

    `specs` is a tree of PartitionSpec for `batch`, or a prefix of its tree; the first axis of every
    global array has `rows` samples.
    """

    def put_subtree(spec: P, subtree: Any) -> Any:
        return jax.tree.map(lambda x: global_array(np.asarray(x), spec), subtree)

    def global_array(x: np.ndarray, spec: P) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # JAX only asks for shards of this process's devices
            low, high, _ = index[0].indices(rows)
            return x[(slice(low - first, high - first), *index[1:])]

        sharding = NamedSharding(mesh, P(*spec[: x.ndim]))
        return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, shard)

    return jax.tree.map(put_subtree, specs, batch, is_leaf=lambda x: isinstance(x, P))


def process_shards(mesh: Mesh) -> range:
    """The indices along the sp axis of this process's devices; they are consecutive."""
    return _addressable_range(NamedSharding(mesh, P(SP)), mesh.shape[SP])


def _addressable_range(sharding: NamedSharding, size: int) -> range:
    """The range of an array of `size` entries that this process's devices hold."""
    indices = sharding.addressable_devices_indices_map((size,)).values()
    spans = [index[0].indices(size) for index in indices if index is not None]
    return range(min(s[0] for s in spans), max(s[1] for s in spans))


def device_put_shards(x: np.ndarray, mesh: Mesh, *, rows: int, first: int = 0) -> jax.Array:
    """A global array [rows, sp n, ...], with samples sharded over data and fsdp, axis 1 over sp.

    `x` [b, k n, ...] has this process's rows, which start at `first`, and along axis 1 its k
    `process_shards`.
    """
    own = process_shards(mesh)
    width = x.shape[1] // len(own)

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # JAX only asks for shards of this process's devices
        low, high, _ = index[0].indices(rows)
        left, right, _ = index[1].indices(mesh.shape[SP] * width)
        begin = own.start * width
        return x[low - first : high - first, left - begin : right - begin]

    shape = (rows, mesh.shape[SP] * width, *x.shape[2:])
    return jax.make_array_from_callback(shape, NamedSharding(mesh, P(BATCH, SP)), shard)


class Feed:
    """An iterator over batches, in order, and a context manager that closes their source.

    Attributes:
      waited: seconds spent waiting for batches.
      skipped: samples that this process could not use and skipped.
    """

    def __init__(self, batches: Iterator[Any], close: Callable[[], None] = lambda: None):
        self._batches, self._close = batches, close
        self.waited, self.skipped = 0.0, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        begin = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.waited += time.perf_counter() - begin


def feed_in_order(batches: Sequence[Any]) -> Callable[[int], Feed]:
    """A function that takes a step and returns the prefetching `Feed` of batches from there on."""

    def begin(start: int) -> Feed:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=3)
        return Feed(iter(grain.MapDataset.source(batches)[start:].to_iter_dataset(options)))

    return begin
