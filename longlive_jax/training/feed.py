"""Batches on their way to the devices: made ahead by a thread, each process its own rows."""

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


def own_rows(mesh: Mesh, rows: int) -> range:
    """The rows of a batch of `rows` that devices of this process have, which are consecutive.

    They follow from the devices' places in the mesh, not from the number of the process: processes
    that share sequences need the same rows.
    """
    places = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((rows,)).values()
    spans = [place[0].indices(rows) for place in places if place is not None]
    return range(min(s[0] for s in spans), max(s[1] for s in spans))


def skipped_by_all(skipped: int, first: int) -> int:
    """Samples skipped in the whole job, by what each process has counted of its rows, from `first`
    on. Processes that share rows share samples: of them the one that has met most counts.

    All processes call it.
    """
    if jax.process_count() == 1:
        return skipped
    most: dict[int, int] = {}
    for row, count in multihost_utils.process_allgather(np.array([first, skipped])):
        most[int(row)] = max(most.get(int(row), 0), int(count))
    return sum(most.values())


def placed(batch: Any, specs: Any, mesh: Mesh, *, rows: int, first: int = 0) -> Any:
    """Arrays over the mesh from this process's rows of a batch, which start at row `first`.

    `specs` is a tree of PartitionSpec for `batch` or a part of its structure; the first axis of
    every array is that of the `rows` samples.
    """

    def one(spec: P, part: Any) -> Any:
        return jax.tree.map(lambda x: _whole(np.asarray(x), spec), part)

    def _whole(x: np.ndarray, spec: P) -> jax.Array:
        def cut(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # asked for only where a device is ours
            low, high, _ = index[0].indices(rows)
            return x[(slice(low - first, high - first), *index[1:])]

        place = NamedSharding(mesh, P(*spec[: x.ndim]))
        return jax.make_array_from_callback((rows, *x.shape[1:]), place, cut)

    return jax.tree.map(one, specs, batch, is_leaf=lambda x: isinstance(x, P))


def own_parts(mesh: Mesh) -> range:
    """The places along the sp axis of devices of this process, which are consecutive."""
    size = mesh.shape[SP]
    places = NamedSharding(mesh, P(SP)).addressable_devices_indices_map((size,)).values()
    spans = [place[0].indices(size) for place in places if place is not None]
    return range(min(s[0] for s in spans), max(s[1] for s in spans))


def placed_parts(x: np.ndarray, mesh: Mesh, *, rows: int, first: int = 0) -> jax.Array:
    """An array [rows, sp n, ...], samples over data and fsdp, axis 1 over sp.

    `x` [b, k n, ...] has this process's rows, from `first` on, and of these its k `own_parts`.
    """
    own = own_parts(mesh)
    width = x.shape[1] // len(own)

    def cut(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # asked for only where a device is ours
        low, high, _ = index[0].indices(rows)
        left, right, _ = index[1].indices(mesh.shape[SP] * width)
        begin = own.start * width
        return x[low - first : high - first, left - begin : right - begin]

    shape = (rows, mesh.shape[SP] * width, *x.shape[2:])
    return jax.make_array_from_callback(shape, NamedSharding(mesh, P(BATCH, SP)), cut)


class Feed:
    """Batches, in order, as a context manager; counts the time waited and the samples skipped.

    Attributes:
      waited: seconds spent in waiting for batches.
      skipped: samples that could not be used and were passed over, by this process.
    """

    def __init__(self, made: Iterator[Any], close: Callable[[], None] = lambda: None):
        self._made, self._close = made, close
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
            return next(self._made)
        finally:
            self.waited += time.perf_counter() - begin


def feed_in_order(batches: Sequence[Any]) -> Callable[[int], Feed]:
    """A function from a step to the `Feed` of the batches from there on, a few made ahead."""

    def begin(start: int) -> Feed:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=3)
        return Feed(iter(grain.MapDataset.source(batches)[start:].to_iter_dataset(options)))

    return begin
