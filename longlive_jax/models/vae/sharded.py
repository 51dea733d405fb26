"""Encoding clips over a mesh, exact, every device its own latents (paper, section 2.1).

A causal encoder's latents need the frames before them. In the paper's way ("halo") a device encodes
as many more of these as the encoder looks back, and drops their latents. Or ("tails") it fetches
the end of every layer's past from its left neighbour, and encodes no frame that is another's. Both
take a few latents at a time, so that working memory does not grow with the clip: with "tails" these
are dealt out in rounds, each device the next few.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.models.params import abstract, with_params
from longlive_jax.models.vae import VAE, VAEConfig, encode_chunk, normalize_frames
from longlive_jax.parallel.halo import equal_windows
from longlive_jax.parallel.mesh import BATCH, SP
from longlive_jax.parallel.tails import continued, fetched
from longlive_jax.typing import Array, Float, Params, Shaped

Method = Literal["halo", "tails"]

AT_ONCE = 8
"""Latents that a device encodes at a time, if its share can be cut so: a chunk of the 5B model."""


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
class VAEShardPlan:
    """Which raw frames of a clip each device of an sp group encodes.

    Attributes:
      latents: of the clip, which has 1 + ratio (latents - 1) frames.
      parts: devices.
      method: "halo" or "tails".
      halo: latents to encode besides one's own.
      step: latents that a device encodes at a time.
      ratio: raw frames a latent.
    """

    latents: int
    parts: int
    method: Method
    halo: int
    step: int
    temporal_stride: int = 4

    @property
    def rounds(self) -> int:
        """In how many parts a device's frames lie in the clip."""
        return 1 if self.method == "halo" else self.latents // (self.parts * self.step)

    @property
    def starts(self) -> tuple[tuple[int, ...], ...]:
        """Of the frames of each device, round by round; below 0 stand frames that are not there."""
        if self.method == "halo":
            return tuple((w.first,) for w in self._windows)
        run = self.temporal_stride * self.step
        return tuple(
            tuple(1 - self.temporal_stride + run * (p + self.parts * r) for r in range(self.rounds))
            for p in range(self.parts)
        )

    @property
    def frames(self) -> int:
        """Raw frames that each encodes; "tails" also takes the clip's first one everywhere."""
        if self.method == "halo":
            return self._windows[0].frames
        return self.temporal_stride * self.latents // self.parts

    @property
    def absent(self) -> int:
        """Frames at the beginning of the first device's that are not there."""
        return max(0, -self.starts[0][0])

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
        run = self.frames // self.rounds
        found = [read(max(first, 0), first + run) for first in self.starts[device]]
        frames = np.concatenate(found, axis=1) if len(found) > 1 else found[0]
        absent = self.absent if device == 0 else 0
        return np.pad(frames, ((0, 0), (absent, 0), (0, 0), (0, 0), (0, 0)))

    def wanted(self, devices: range) -> np.ndarray:
        """Numbers of the raw frames that these devices encode, rising."""
        run = self.frames // self.rounds
        spans = [range(max(at, 0), at + run) for p in devices for at in self.starts[p]]
        return np.unique(np.concatenate([np.asarray(span) for span in spans]))

    @property
    def _windows(self):
        return equal_windows(
            self.latents, self.parts, halo=self.halo, temporal_stride=self.temporal_stride
        )


def sharing(
    cfg: VAEConfig,
    latents: int,
    parts: int,
    method: Method | None = None,
    *,
    at_once: int = AT_ONCE,
) -> VAEShardPlan:
    """How `parts` devices share a clip out; by default in the way that takes the least work.

    That is "tails" wherever there are two devices, and two latents for each of them. A device
    encodes up to `at_once` latents at a time, or all of its own if they have no divisor from 2 to
    that. Raises ValueError if latents do not split, or are too few for "tails".
    """
    if latents % parts:
        raise ValueError(
            f"{latents} latents do not split over mesh.sp = {parts}; choose a divisor of {latents}"
        )
    own = latents // parts
    few = own < 2
    if method == "tails" and few:
        raise ValueError(
            f"{own} latents a device are too few to exchange tails; use a smaller "
            "mesh.sp or longer clips, 2 latents a device at least, or a halo"
        )
    halo = math.ceil(lookback(cfg) / cfg.temporal_stride)
    step = max((n for n in range(2, at_once + 1) if own % n == 0), default=own)
    steps: dict[Method, int] = {"halo": at_once, "tails": step}
    ways = {
        name: VAEShardPlan(latents, parts, name, halo, steps[name], cfg.temporal_stride)
        for name in ("halo", "tails")
        if not (name == "tails" and few)
    }
    if method is not None:
        return ways[method]
    return min(ways.values(), key=groups_encoded)


def groups_encoded(way: VAEShardPlan) -> int:
    """Groups of `temporal_stride` frames that a device encodes after the clip's first frame."""
    return way.frames // way.temporal_stride


@dataclasses.dataclass(frozen=True)
class Work:
    """Floating-point operations of encoding a clip's first frame, in one go with others (`leading`)
    or `alone`, and of each group of frames after it."""

    leading: float
    alone: float
    group: float


def flops_per_device(way: VAEShardPlan, cfg: VAEConfig, size: tuple[int, int]) -> float:
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
    group = flops(cfg.temporal_stride, tails)
    return Work(flops(1 + cfg.temporal_stride, None) - group, flops(1, None), group)


def encode_sharded(
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
    latents = (video.shape[1] + cfg.temporal_stride - 1) // cfg.temporal_stride
    way = sharing(cfg, latents, mesh.shape[SP], method)
    padded = jnp.pad(video, ((0, 0), (way.absent, 0), (0, 0), (0, 0), (0, 0)))
    begins = [start + way.absent for starts in way.starts for start in starts]
    run = way.frames // way.rounds
    parts = jnp.concatenate([padded[:, at : at + run] for at in begins], axis=1)
    return encode_parts(graphdef, params, video[:, :1], parts, mesh, way)


def encode_parts(
    graphdef: nnx.GraphDef[VAE],
    params: Params,
    first: Shaped[Array, "b 1 h w 3"],
    parts: Shaped[Array, "b pn h w 3"],
    mesh: Mesh,
    way: VAEShardPlan,
) -> Float[Array, "b g h w z"]:
    """As `encode_sharded`, of frames that are already where they are encoded.

    `parts` has `way.part` of every device side by side, each on its device, `first` the clips'
    first frames on all (only "tails" looks at them).
    """
    own = {"halo": _encode_window, "tails": _encode_own}[way.method]
    run = jax.shard_map(
        functools.partial(own, graphdef, way),
        mesh=mesh,
        in_specs=(P(), P(BATCH), P(BATCH, SP)),
        out_specs=P(None, BATCH, SP),
        check_vma=False,
    )
    rounds = run(params, first, parts)  # [r, b, latents of a round, h, w, z]
    latents = jnp.moveaxis(rounds, 0, 1).reshape(first.shape[0], way.latents, *rounds.shape[3:])
    return jax.lax.with_sharding_constraint(latents, NamedSharding(mesh, P(BATCH, SP)))


def _encode_window(
    graphdef, way: VAEShardPlan, params: Params, _first: Array, window: Array
) -> Array:
    """A device's latents [1, b, n, h, w, z] from frames that begin far enough before them."""
    vae, run = with_params(graphdef, params), way.temporal_stride * way.step
    begin = 1 + (window.shape[1] - 1) % run
    start, tails = _encode(vae, window[:, :begin])

    def go_on(tails: Any, frames: Array):
        latents, tails = _encode(vae, frames, tails)
        return tails, latents

    rest = jax.lax.scan(go_on, tails, _runs(window[:, begin:], run))[1]
    rest = jnp.moveaxis(rest, 0, 1).reshape(start.shape[0], -1, *start.shape[2:])
    latents = jnp.concatenate([start, rest], axis=1)
    at = jnp.asarray(way.dropped)[jax.lax.axis_index(SP)]
    return jax.lax.dynamic_slice_in_dim(latents, at, way.latents // way.parts, axis=1)[None]


def _encode_own(graphdef, way: VAEShardPlan, params: Params, first: Array, own: Array) -> Array:
    """A device's latents [r, b, n, h, w, z], round by round. The first frame leads the first
    device's, in the place of what is absent; the others encode it too, in step, and do not use it.
    """
    vae = with_params(graphdef, params)
    runs = _runs(own, way.temporal_stride * way.step)
    start, tails = _encode(vae, first)
    latents, tails = _encode(vae, runs[0], fetched(tails, way.step))
    leading = jnp.concatenate([start, latents[:, 1:]], axis=1)
    latents = jnp.where(jax.lax.axis_index(SP) == 0, leading, latents)

    def go_on(tails: Any, frames: Array):
        latents, tails = _encode(vae, frames, continued(tails, way.step))
        return tails, latents

    rest = jax.lax.scan(go_on, tails, runs[1:])[1]
    return jnp.concatenate([latents[None], rest])


def _encode(vae: VAE, frames: Array, tails: Any = None):
    """Bytes become colours here, a run at a time."""
    return encode_chunk(
        vae, normalize_frames(frames) if frames.dtype == jnp.uint8 else frames, tails
    )


def _runs(frames: Array, length: int) -> Array:
    """[b, r * length, ...] as [r, b, length, ...]."""
    return jnp.moveaxis(frames.reshape(frames.shape[0], -1, length, *frames.shape[2:]), 1, 0)
