"""What teacher and critic say of a video: estimates of its clean latents at a noise level.

Both see the whole video under a causal mask: one noisy sequence, or with clean context every noisy
chunk after the clean chunks before it (teacher forcing). (Paper, section 4.1.)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from longlive_jax import layout
from longlive_jax.diffusion.flow import corrupt, velocity_target, x0_from_velocity
from longlive_jax.models.wan.dit import DiT
from longlive_jax.training.objectives.dmd.draws import ScoreDraws, ScoreSpec
from longlive_jax.training.objectives.dmd.rollout import Scene
from longlive_jax.typing import Array, Bool, Float
from pallas_kernels.attention import AttentionFn
from pallas_kernels.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class ScoreFn:
    """The velocity that a score model predicts for a video at its noise levels.

    Attributes:
      spec: settings of the scores.
      chunk_frames: latent frames of a chunk.
      attention_for: tokens -> self-attention over sequences of them.
      options: further arguments of `DiT.__call__`, such as `remat`.
    """

    spec: ScoreSpec
    chunk_frames: int
    attention_for: Callable[[Tokens], AttentionFn]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(
        self,
        dit: DiT,
        x: Float[Array, "b f h w c"],
        clean: Float[Array, "b f h w c"],
        timestep: Float[Array, "b f"],
        text: Float[Array, "b n t e"],
        cut: Bool[Array, "b n"],
    ) -> Float[Array, "b f h w c"]:
        """Velocity at the noisy video `x`; `clean` is its clean context, read if the spec says so.

        `text` has one prompt per chunk, or one for all.
        """
        streams = 2 if self.spec.context == "clean" else 1
        tokens = self._tokens(x.shape, cut)
        latents, times, first = x, timestep, 0
        if streams == 2:
            latents = jnp.concatenate([clean, x], axis=1)
            times = jnp.concatenate([jnp.zeros_like(timestep), timestep], axis=1)
            first = x.shape[1]
        velocity, _ = dit(
            latents,
            times,
            dit.embed_text(text, streams=streams),
            tokens,
            attend=self.attention_for(tokens),
            noisy_from=first,
            **self.options,
        )
        assert velocity is not None
        return velocity

    def _tokens(self, shape: tuple[int, ...], cut: Array) -> Tokens:
        """Tokens of the sequence; their mask is known when tracing."""
        offset = None
        if self.spec.shot_rope_offset:
            shot = jnp.cumsum(cut, axis=1) * self.spec.shot_rope_offset
            offset = jnp.repeat(shot, self.chunk_frames, axis=1)
        make = layout.teacher_forcing if self.spec.context == "clean" else layout.grid
        return make(
            shape[1],
            shape[2] // 2,
            shape[3] // 2,
            chunk_frames=self.chunk_frames,
            shot_rope_offset=offset,
        )


def add_noise(
    x: Float[Array, "b f h w c"], scene: Scene, draws: ScoreDraws
) -> Float[Array, "b f h w c"]:
    """The video at the noise levels of `draws`; a given first frame stays clean."""
    noisy = corrupt(x, draws.noise, draws.sigma)
    if scene.first_frame is None:
        return noisy
    return noisy.at[:, 0].set(scene.first_frame.astype(noisy.dtype))


def teacher_x0(
    score: ScoreFn,
    dit: DiT,
    x: Float[Array, "b f h w c"],
    clean: Float[Array, "b f h w c"],
    scene: Scene,
    negative: Float[Array, "b 1 t e"],
    draws: ScoreDraws,
) -> Float[Array, "b f h w c"]:
    """The teacher's estimate of the clean video, guided away from the negative prompt."""

    def estimate(text: Array) -> Array:
        velocity = score(dit, x, clean, draws.timestep, text, scene.cut)
        return x0_from_velocity(x, velocity, draws.sigma)

    conditional, scale = estimate(scene.text), score.spec.guidance
    if scale == 1:
        return conditional
    unconditional = estimate(negative)
    return unconditional + scale * (conditional - unconditional)


def critic_x0(
    score: ScoreFn,
    dit: DiT,
    x: Float[Array, "b f h w c"],
    clean: Float[Array, "b f h w c"],
    scene: Scene,
    draws: ScoreDraws,
) -> Float[Array, "b f h w c"]:
    """The critic's estimate of the clean video, without guidance."""
    velocity = score(dit, x, clean, draws.timestep, scene.text, scene.cut)
    return x0_from_velocity(x, velocity, draws.sigma)


def matching_gradient(
    x: Float[Array, "b f h w c"],
    fake: Float[Array, "b f h w c"],
    real: Float[Array, "b f h w c"],
    *,
    chunk_frames: int,
) -> tuple[Float[Array, "b f h w c"], Float[Array, "b n"]]:
    """The gradient of distribution matching, `(fake - real) / mean |x - real|`, and the mean.

    The mean is over the frames and channels of a chunk. The gradient of a chunk that equals the
    teacher's estimate is 0. Scores that are not finite make it not finite, so that the trainer
    skips the update.
    """
    chunks = x.shape[1] // chunk_frames
    by_chunk = (x.shape[0], chunks, chunk_frames, *x.shape[2:])
    norm = jnp.mean(jnp.abs(x - real).reshape(by_chunk), axis=(2, 3, 4, 5))
    per_frame = jnp.repeat(norm, chunk_frames, axis=1)[:, :, None, None, None]
    is_equal = per_frame == 0
    return jnp.where(is_equal, 0.0, (fake - real) / jnp.where(is_equal, 1.0, per_frame)), norm


def score_target(x: Float[Array, "b f h w c"], draws: ScoreDraws) -> Float[Array, "b f h w c"]:
    """The velocity that the critic learns: noise - x."""
    return velocity_target(x, draws.noise)
