"""Encoding clips over a mesh, exact, every device its own latents (paper, section 2.1).

A causal encoder's latents need the frames before them. In the paper's way ("halo") a device encodes
as many more of these as the encoder looks back, and drops their latents. Or ("tails") it fetches
the end of every layer's past from its left neighbour, and encodes no frame that is another's.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.models.params import abstract, with_params
from longlive_jax.models.vae import VAE, VAEConfig, encode_chunk
from longlive_jax.parallel.halo import equal_windows
from longlive_jax.parallel.mesh import BATCH, SP
from longlive_jax.parallel.tails import fetched
from longlive_jax.typing import Array, Float, Params

Method = Literal["halo", "tails"]


def lookback(cfg: VAEConfig) -> int:
    """Raw frames before its last one that a latent depends on: 112 for Wan 2.2, or 28 latents.

    Every convolution over time reaches back two frames at its own rate, a halving of it included.
    """
    rate = 1
    frames = 2
    for stage in range(len(cfg.dim_mult)):
        frames += rate * 4 * cfg.res_blocks
        if stage < len(cfg.temporal_down) and cfg.temporal_down[stage]:
            frames += 2 * rate
            rate *= 2
    return frames + rate * (8 + 2)  # two residual blocks in the middle, and the last convolution


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Which raw frames of a clip each device of an sp group encodes.

    Attributes:
      latents: of the clip, which has 1 + ratio (latents - 1) frames.
      parts: devices.
      method: "halo" or "tails".
      halo: latents to encode besides one's own.
      ratio: raw frames a latent.
    """

    latents: int
    parts: int
    method: Method
    halo: int
    ratio: int = 4

    @property
    def starts(self) -> tuple[int, ...]:
        """Of the frames that each device encodes; below 0 stand frames that are not there."""
        if self.method == "halo":
            return tuple(w.first for w in self._windows)
        own = self.ratio * self.latents // self.parts
        return tuple(1 - self.ratio + own * p for p in range(self.parts))

    @property
    def frames(self) -> int:
        """Raw frames that each encodes; "tails" also takes the clip's first one everywhere."""
        if self.method == "halo":
            return self._windows[0].frames
        return self.ratio * self.latents // self.parts

    @property
    def dropped(self) -> tuple[int, ...]:
        """Latents that each makes before its own."""
        if self.method == "halo":
            return tuple(w.dropped for w in self._windows)
        return (0,) * self.parts

    def part(self, read: Callable[[int, int], np.ndarray], device: int) -> np.ndarray:
        """Frames [b, n, h, w, 3] of one device, of a clip of which `read(first, last)` gives some.

        Nothing else of the clip is read.
        """
        first = self.starts[device]
        frames = read(max(first, 0), first + self.frames)
        absent = max(0, -first)
        return np.pad(frames, ((0, 0), (absent, 0), (0, 0), (0, 0), (0, 0)))

    @property
    def _windows(self):
        return equal_windows(self.latents, self.parts, halo=self.halo, ratio=self.ratio)


def sharing(cfg: VAEConfig, latents: int, parts: int, method: Method | None = None) -> Sharing:
    """How `parts` devices share a clip out; by default in the way that takes the least work.

    That is "tails" wherever there are two devices, and two latents for each of them. Raises
    ValueError if latents do not split, or are too few for "tails".
    """
    if latents % parts:
        raise ValueError(
            f"{latents} latents do not split over mesh.sp = {parts}; choose a divisor of {latents}"
        )
    few = latents // parts < 2
    if method == "tails" and few:
        raise ValueError(
            f"{latents // parts} latents a device are too few to exchange tails; use a smaller "
            "mesh.sp or longer clips, 2 latents a device at least, or a halo"
        )
    halo = math.ceil(lookback(cfg) / cfg.temporal_ratio)
    ways = {
        name: Sharing(latents, parts, name, halo, cfg.temporal_ratio)
        for name in ("halo", "tails")
        if not (name == "tails" and few)
    }
    if method is not None:
        return ways[method]
    return min(ways.values(), key=groups_encoded)


def groups_encoded(way: Sharing) -> int:
    """Groups of `ratio` frames that a device encodes, the clip's single first frame apart."""
    return way.frames // way.ratio


@dataclasses.dataclass(frozen=True)
class Work:
    """Floating-point operations of encoding a clip's first frame, in one go with others (`leading`)
    or `alone`, and of each group of frames after it."""

    leading: float
    alone: float
    group: float


def flops_per_device(way: Sharing, cfg: VAEConfig, size: tuple[int, int]) -> float:
    """Floating-point operations of encoding one clip of `size` (height, width) pixels."""
    work = work_of(cfg, size)
    first = work.leading if way.method == "halo" else work.alone
    return first + groups_encoded(way) * work.group


@functools.cache
def work_of(cfg: VAEConfig, size: tuple[int, int]) -> Work:
    """Counted by XLA in programs for these shapes, before optimization; nothing is allocated."""
    graphdef, params = abstract(lambda: VAE(cfg, rngs=nnx.Rngs(0)))

    def run(params: Params, frames: Array, tails):
        return encode_chunk(with_params(graphdef, params), frames, tails)

    def frames(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, count, *size, 3), cfg.dtype)

    def flops(count: int, tails) -> float:
        counted = jax.jit(run).lower(params, frames(count), tails).cost_analysis()
        assert counted is not None  # every backend counts
        return counted["flops"]

    _, tails = jax.eval_shape(run, params, frames(1), None)
    group = flops(cfg.temporal_ratio, tails)
    return Work(flops(1 + cfg.temporal_ratio, None) - group, flops(1, None), group)


def encode_shared(
    graphdef: nnx.GraphDef[VAE],
    params: Params,
    video: Float[Array, "b f h w 3"],
    mesh: Mesh,
    *,
    method: Method | None = None,
) -> Float[Array, "b g h w z"]:
    """Latents of clips of 1 + 4 (g - 1) frames, samples over data and fsdp, latents over sp.

    The same as encoding them whole, to rounding. Raises ValueError as `sharing` does.
    """
    cfg = with_params(graphdef, params).cfg
    latents = (video.shape[1] + cfg.temporal_ratio - 1) // cfg.temporal_ratio
    way = sharing(cfg, latents, mesh.shape[SP], method)
    absent = max(0, -way.starts[0])
    padded = jnp.pad(video, ((0, 0), (absent, 0), (0, 0), (0, 0), (0, 0)))
    parts = [padded[:, a + absent : a + absent + way.frames] for a in way.starts]
    return encode_parts(graphdef, params, video[:, :1], jnp.concatenate(parts, axis=1), mesh, way)


def encode_parts(
    graphdef: nnx.GraphDef[VAE],
    params: Params,
    first: Float[Array, "b 1 h w 3"],
    parts: Float[Array, "b pn h w 3"],
    mesh: Mesh,
    way: Sharing,
) -> Float[Array, "b g h w z"]:
    """As `encode_shared`, of frames that are already where they are encoded.

    `parts` has `way.part` of every device side by side, each on its device, `first` the clips'
    first frames on all (only "tails" looks at them).
    """
    split = P(BATCH, SP)
    own = {"halo": _encode_window, "tails": _encode_own}[way.method]
    run = jax.shard_map(
        functools.partial(own, graphdef, way),
        mesh=mesh,
        in_specs=(P(), P(BATCH), split),
        out_specs=split,
        check_vma=False,
    )
    return run(params, first, parts)


def _encode_window(graphdef, way: Sharing, params: Params, _first: Array, window: Array) -> Array:
    """A device's latents from frames that begin far enough before them."""
    latents, _ = encode_chunk(with_params(graphdef, params), window)
    begin = jnp.asarray(way.dropped)[jax.lax.axis_index(SP)]
    return jax.lax.dynamic_slice_in_dim(latents, begin, way.latents // way.parts, axis=1)


def _encode_own(graphdef, way: Sharing, params: Params, first: Array, own: Array) -> Array:
    """A device's latents. The first frame leads the first device's, in the place of what is absent;
    the others encode it too, in step, and do not use it."""
    vae = with_params(graphdef, params)
    start, tails = encode_chunk(vae, first)
    latents, _ = encode_chunk(vae, own, fetched(tails, way.latents // way.parts))
    leading = jnp.concatenate([start, latents[:, 1:]], axis=1)
    return jnp.where(jax.lax.axis_index(SP) == 0, leading, latents)
