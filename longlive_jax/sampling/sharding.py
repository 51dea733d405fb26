"""Data parallelism of the sampler: each device of a mesh samples its own videos of a batch.

The functions of the DiT and the VAE run inside one `shard_map` over the axis `data`. Parameters are
replicated, videos are independent, so nothing is communicated. With guidance, a device's rows of
the cache are its videos, then their negative prompts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.models.per_layer import is_unstacked
from longlive_jax.models.wan.cache import KVCache
from longlive_jax.parallel.mesh import DATA
from longlive_jax.spec import UserError

REPLICATED, VIDEOS, LAYERS_VIDEOS = P(), P(DATA), P(None, DATA)
"""Every device has the full array; axis 0 is sharded by videos; axis 1 is, after the layers."""


def data_mesh(mesh: Any) -> Mesh:
    """A mesh with the axis `data` alone, over the devices of `mesh`.

    Raises TypeError for what is not a mesh, UserError for one that shards anything but videos.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}")
    other = {name: size for name, size in mesh.shape.items() if name != DATA and size > 1}
    if other:
        axes = ", ".join(f"{name}={size}" for name, size in other.items())
        raise UserError(
            f"sampling shards videos over the mesh axis {DATA!r} only, and the mesh has {axes}; "
            f"sharding a sequence or the parameters is not supported yet"
        )
    return Mesh(mesh.devices.reshape(-1), (DATA,), axis_types=(AxisType.Auto,))


def check_divides(mesh: Mesh | None, videos: int) -> None:
    """UserError unless the devices get the same number of videos each."""
    if mesh is not None and videos % mesh.size:
        raise UserError(
            f"a batch of {videos} does not split over {mesh.size} devices; give a multiple of "
            f"{mesh.size} scripts"
        )


def shard_cache(mesh: Mesh, cache: KVCache) -> KVCache:
    """The cache with each video's rows on its device."""
    specs = cache_specs(cache)
    k, v = (jax.device_put(x, NamedSharding(mesh, specs.k)) for x in (cache.k, cache.v))
    rest = {
        name: jax.device_put(getattr(cache, name), NamedSharding(mesh, VIDEOS)) for name in _ROWS
    }
    return dataclasses.replace(specs, k=k, v=v, **rest)


def cache_specs(cache: KVCache) -> Any:
    """Partition specs of a cache, as a prefix of it."""
    rows: dict[str, Any] = dict.fromkeys(_ROWS, VIDEOS)
    slots = VIDEOS if is_unstacked(cache.k) else LAYERS_VIDEOS
    return dataclasses.replace(cache, k=slots, v=slots, **rows)


_ROWS = ("slot_chunk", "start", "sink_start", "sink_length", "num_chunks")


def over_videos(
    mesh: Mesh | None,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    specs: tuple[Any, ...],
    outputs: Any,
) -> Any:
    """`function(*arguments)`, each device with its own videos; without a mesh, a plain call.

    `specs` and `outputs` are the partition specs of arguments and results.
    """
    if mesh is None:
        return function(*arguments)
    run = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=outputs, check_vma=False)
    return run(*arguments)


def rows_by_device(videos: int, devices: int) -> np.ndarray:
    """Order of `[videos, negatives]` in which each device has its videos, then their negatives."""
    rows = np.arange(2 * videos).reshape(2, devices, videos // devices)
    return rows.swapaxes(0, 1).reshape(-1)
