"""VAE encoding over a mesh: every device computes its own latents, exactly (paper, section 2.1).

The latents of a causal encoder depend on earlier frames. With the paper's method ("halo") a device
also encodes as many earlier frames as the encoder looks back, and drops their latents. With "tails"
it receives every layer's causal padding from its left neighbour, so no frame is encoded twice. Both
methods encode a few latents at a time, so that working memory does not grow with the clip. With
"tails" those steps are rounds, in which each device takes the next few latents of the clip.
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
from longlive_jax.parallel.tails import first_round_tails, next_round_tails
from longlive_jax.typing import Array, Float, Params, Shaped

Method = Literal["halo", "tails"]

LATENTS_PER_STEP = 8
"""Maximum number of latents that a device encodes at a time: a chunk of the 5B model."""


def lookback(cfg: VAEConfig) -> int:
    """Raw frames before its last one that a latent depends on: 112 (28 latents) for Wan 2.2.

    Every temporal convolution, including the downsampling ones, looks back two frames at the frame
    rate of its stage.
    """
    stride = 1
    frames = 2
    for stage in range(len(cfg.dim_mult)):
        frames += stride * 4 * cfg.res_blocks
        if stage < len(cfg.temporal_down) and cfg.temporal_down[stage]:
            frames += 2 * stride
            stride *= 2
    return frames + stride * (8 + 2)  # two residual blocks in the middle, and the last convolution


@dataclasses.dataclass(frozen=True)
class VAEShardPlan:
    """The assignment of a clip's raw frames to the devices of an sp group.

    Attributes:
      latents: number of latents in the clip, which has 1 + temporal_stride (latents - 1) frames.
      num_shards: number of devices along sp.
      method: "halo" or "tails".
      halo: number of extra latents to encode before a device's own, with "halo".
      step: number of latents that a device encodes at a time.
      temporal_stride: raw frames per latent.
    """

    latents: int
    num_shards: int
    method: Method
    halo: int
    step: int
    temporal_stride: int = 4

    @property
    def rounds(self) -> int:
        """Number of separate frame ranges that a device encodes."""
        return 1 if self.method == "halo" else self.latents // (self.num_shards * self.step)

    @property
    def starts(self) -> tuple[tuple[int, ...], ...]:
        """First raw frame of each device's range in each round; negative means padding frames."""
        if self.method == "halo":
            return tuple((w.first,) for w in self._windows)
        span = self.temporal_stride * self.step
        return tuple(
            tuple(
                1 - self.temporal_stride + span * (p + self.num_shards * r)
                for r in range(self.rounds)
            )
            for p in range(self.num_shards)
        )

    @property
    def frames(self) -> int:
        """Raw frames per device; with "tails" every device also gets the clip's first frame."""
        if self.method == "halo":
            return self._windows[0].frames
        return self.temporal_stride * self.latents // self.num_shards

    @property
    def num_padding(self) -> int:
        """Number of padding frames at the beginning of the first device's frames."""
        return max(0, -self.starts[0][0])

    @property
    def dropped(self) -> tuple[int, ...]:
        """Number of leading latents that each device encodes and then drops."""
        if self.method == "halo":
            return tuple(w.dropped for w in self._windows)
        return (0,) * self.num_shards

    def device_frames(self, read: Callable[[int, int], np.ndarray], device: int) -> np.ndarray:
        """The frames [b, n, h, w, 3] for one device.

        `read(first, last)` returns frames [first, last) of the clip; only the device's own frames
        are read.
        """
        span = self.frames // self.rounds
        ranges = [read(max(first, 0), first + span) for first in self.starts[device]]
        frames = np.concatenate(ranges, axis=1) if len(ranges) > 1 else ranges[0]
        num_padding = self.num_padding if device == 0 else 0
        return np.pad(frames, ((0, 0), (num_padding, 0), (0, 0), (0, 0), (0, 0)))

    def frame_indices(self, devices: range) -> np.ndarray:
        """Indices of all raw frames that these devices encode, in ascending order."""
        span = self.frames // self.rounds
        ranges = [range(max(first, 0), first + span) for p in devices for first in self.starts[p]]
        return np.unique(np.concatenate([np.asarray(indices) for indices in ranges]))

    @property
    def _windows(self):
        return equal_windows(
            self.latents, self.num_shards, halo=self.halo, temporal_stride=self.temporal_stride
        )


def plan_vae_shards(
    cfg: VAEConfig,
    latents: int,
    num_shards: int,
    method: Method | None = None,
    *,
    max_step: int = LATENTS_PER_STEP,
) -> VAEShardPlan:
    """Plans how `num_shards` devices encode a clip; the default method needs the fewest FLOPs.

    That is "tails" whenever there are at least two devices and two latents per device. A device
    encodes up to `max_step` latents at a time, or all of its own at once if their number has no
    divisor from 2 to `max_step`.

    Raises:
      ValueError: `num_shards` does not divide the latents, or they are too few for "tails".
    """
    if latents % num_shards:
        raise ValueError(
            f"{latents} latents do not split over mesh.sp = {num_shards}; choose a divisor of "
            f"{latents}"
        )
    own = latents // num_shards
    too_few = own < 2
    if method == "tails" and too_few:
        raise ValueError(
            f"{own} latents per device are too few to exchange tails; use a smaller mesh.sp or "
            "longer clips, at least 2 latents per device, or a halo"
        )
    halo = math.ceil(lookback(cfg) / cfg.temporal_stride)
    step = max((n for n in range(2, max_step + 1) if own % n == 0), default=own)
    steps: dict[Method, int] = {"halo": max_step, "tails": step}
    plans = {
        name: VAEShardPlan(latents, num_shards, name, halo, steps[name], cfg.temporal_stride)
        for name in ("halo", "tails")
        if not (name == "tails" and too_few)
    }
    if method is not None:
        return plans[method]
    return min(plans.values(), key=num_frame_groups)


def num_frame_groups(shard_plan: VAEShardPlan) -> int:
    """Groups of `temporal_stride` frames that a device encodes after the clip's first frame."""
    return shard_plan.frames // shard_plan.temporal_stride


@dataclasses.dataclass(frozen=True)
class EncoderFlops:
    """FLOPs of encoding parts of a clip.

    Attributes:
      leading: the clip's first frame, encoded in one call with later frames.
      alone: the clip's first frame in a call of its own.
      group: each later group of `temporal_stride` frames.
    """

    leading: float
    alone: float
    group: float


def flops_per_device(shard_plan: VAEShardPlan, cfg: VAEConfig, size: tuple[int, int]) -> float:
    """FLOPs per device of encoding one clip of `size` (height, width) pixels."""
    flops = encoder_flops(cfg, size)
    first = flops.leading if shard_plan.method == "halo" else flops.alone
    return first + num_frame_groups(shard_plan) * flops.group


@functools.cache
def encoder_flops(cfg: VAEConfig, size: tuple[int, int]) -> EncoderFlops:
    """FLOPs as XLA counts them before optimisation, for frames of `size`; allocates nothing."""
    graphdef, params = abstract(lambda: VAE(cfg, rngs=nnx.Rngs(0)))

    def run(params: Params, frames: Array, tails):
        return encode_chunk(with_params(graphdef, params), frames, tails)

    def frames(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, count, *size, 3), cfg.dtype)

    def count_flops(count: int, tails) -> float:
        cost = jax.jit(run).lower(params, frames(count), tails).cost_analysis()
        assert cost is not None  # every backend provides it
        return cost["flops"]

    _, tails = jax.eval_shape(run, params, frames(1), None)
    group = count_flops(cfg.temporal_stride, tails)
    leading = count_flops(1 + cfg.temporal_stride, None) - group
    return EncoderFlops(leading, count_flops(1, None), group)


def encode_sharded(
    graphdef: nnx.GraphDef[VAE],
    params: Params,
    video: Float[Array, "b f h w 3"],
    mesh: Mesh,
    *,
    method: Method | None = None,
) -> Float[Array, "b g h w z"]:
    """Encodes clips of 1 + temporal_stride (g - 1) frames over a mesh.

    Samples are sharded over data and fsdp, latents over sp. The result equals encoding on one
    device up to rounding. Raises ValueError as `plan_vae_shards` does.
    """
    cfg = with_params(graphdef, params).cfg
    latents = (video.shape[1] + cfg.temporal_stride - 1) // cfg.temporal_stride
    shard_plan = plan_vae_shards(cfg, latents, mesh.shape[SP], method)
    num_padding = shard_plan.num_padding
    padded = jnp.pad(video, ((0, 0), (num_padding, 0), (0, 0), (0, 0), (0, 0)))
    firsts = [first + num_padding for starts in shard_plan.starts for first in starts]
    span = shard_plan.frames // shard_plan.rounds
    frame_shards = jnp.concatenate([padded[:, i : i + span] for i in firsts], axis=1)
    return encode_frame_shards(graphdef, params, video[:, :1], frame_shards, mesh, shard_plan)


def encode_frame_shards(
    graphdef: nnx.GraphDef[VAE],
    params: Params,
    first: Shaped[Array, "b 1 h w 3"],
    frame_shards: Shaped[Array, "b pn h w 3"],
    mesh: Mesh,
    shard_plan: VAEShardPlan,
) -> Float[Array, "b g h w z"]:
    """Encodes frames that are already on the devices that `shard_plan` assigns them to.

    Args:
      graphdef: graph definition of the VAE.
      params: parameters of the VAE, replicated.
      first: the clips' first frames, replicated along sp (only "tails" uses them).
      frame_shards: `shard_plan.device_frames` of all devices, concatenated and sharded over sp.
      mesh: the device mesh.
      shard_plan: the plan that assigned the frames.

    Returns:
      Latents, sharded as those of `encode_sharded`.
    """
    encode_shard = {"halo": _encode_window, "tails": _encode_rounds}[shard_plan.method]
    run = jax.shard_map(
        functools.partial(encode_shard, graphdef, shard_plan),
        mesh=mesh,
        in_specs=(P(), P(BATCH), P(BATCH, SP)),
        out_specs=P(None, BATCH, SP),
        check_vma=False,
    )
    rounds = run(params, first, frame_shards)  # [r, b, latents of a round, h, w, z]
    latents = jnp.moveaxis(rounds, 0, 1)
    latents = latents.reshape(first.shape[0], shard_plan.latents, *rounds.shape[3:])
    return jax.lax.with_sharding_constraint(latents, NamedSharding(mesh, P(BATCH, SP)))


def _encode_window(
    graphdef, shard_plan: VAEShardPlan, params: Params, _first: Array, window: Array
) -> Array:
    """A device's latents [1, b, n, h, w, z], from its frames with the halo before them."""
    vae, span = with_params(graphdef, params), shard_plan.temporal_stride * shard_plan.step
    # 1. Encode the first frame and what does not fill a step, then scan over steps.
    begin = 1 + (window.shape[1] - 1) % span
    start, tails = _encode(vae, window[:, :begin])

    def step(tails: Any, frames: Array):
        latents, tails = _encode(vae, frames, tails)
        return tails, latents

    rest = jax.lax.scan(step, tails, _split_steps(window[:, begin:], span))[1]
    rest = jnp.moveaxis(rest, 0, 1).reshape(start.shape[0], -1, *start.shape[2:])
    latents = jnp.concatenate([start, rest], axis=1)
    # 2. Drop the halo's latents.
    dropped = jnp.asarray(shard_plan.dropped)[jax.lax.axis_index(SP)]
    own = shard_plan.latents // shard_plan.num_shards
    return jax.lax.dynamic_slice_in_dim(latents, dropped, own, axis=1)[None]


def _encode_rounds(
    graphdef, shard_plan: VAEShardPlan, params: Params, first: Array, frames: Array
) -> Array:
    """A device's latents [r, b, n, h, w, z], one entry per round.

    On the first device the clip's first frame takes the place of the padding. The others encode it
    too, because devices run in lockstep, and ignore the result.
    """
    vae = with_params(graphdef, params)
    rounds = _split_steps(frames, shard_plan.temporal_stride * shard_plan.step)
    # 1. The first frame, and the first round.
    start, tails = _encode(vae, first)
    latents, tails = _encode(vae, rounds[0], first_round_tails(tails, shard_plan.step))
    leading = jnp.concatenate([start, latents[:, 1:]], axis=1)
    latents = jnp.where(jax.lax.axis_index(SP) == 0, leading, latents)

    # 2. The later rounds.
    def step(tails: Any, frames: Array):
        latents, tails = _encode(vae, frames, next_round_tails(tails, shard_plan.step))
        return tails, latents

    rest = jax.lax.scan(step, tails, rounds[1:])[1]
    return jnp.concatenate([latents[None], rest])


def _encode(vae: VAE, frames: Array, tails: Any = None):
    """`encode_chunk`, with uint8 frames normalised here, a step at a time, to save memory."""
    return encode_chunk(
        vae, normalize_frames(frames) if frames.dtype == jnp.uint8 else frames, tails
    )


def _split_steps(frames: Array, length: int) -> Array:
    """Reshapes [b, r * length, ...] to [r, b, length, ...]."""
    return jnp.moveaxis(frames.reshape(frames.shape[0], -1, length, *frames.shape[2:]), 1, 0)
