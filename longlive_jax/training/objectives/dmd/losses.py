"""The two losses of distribution matching distillation (paper, section 4.1; reference facts, 9).

    GeneratorLoss -> rollout -> student_pass -> teacher and critic -> matching gradient
    CriticLoss    -> rollout -> flow matching of the critic on the student's videos

Each has a rollout of its own, with its own noise and exit step. Everything random is drawn before
the work is divided over devices, so no result depends on the mesh.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax

from longlive_jax.models.params import with_params
from longlive_jax.models.wan.cache import KVCache, empty_cache
from longlive_jax.models.wan.dit import DiT
from longlive_jax.quant.lora import without_dropout
from longlive_jax.training.objectives.dmd.draws import (
    PromptBatch,
    RolloutDraws,
    RolloutSpec,
    ScoreDraws,
    ScoreSpec,
)
from longlive_jax.training.objectives.dmd.rollout import Rollout, Scene, rollout, student_pass
from longlive_jax.training.objectives.dmd.scores import (
    ScoreFn,
    add_noise,
    critic_x0,
    matching_gradient,
    score_target,
    teacher_x0,
)
from longlive_jax.training.update import Metrics
from longlive_jax.typing import Array, Float, Params
from pallas_kernels.attention import AttentionFn, attention

_LEVELS = {
    "error_low_noise": (0.0, 0.5),
    "error_mid_noise": (0.5, 0.85),
    "error_high_noise": (0.85, 1.01),
}
"""Metrics of the critic's error by noise level, and their ranges of levels."""


@dataclasses.dataclass(frozen=True)
class Shards:
    """How devices divide the work; by default there is one device.

    Attributes:
      around: (structure of the model, parameters) -> the model, called with whole videos.
      make_cache: `empty_cache`, of the heads that a device attends.
      reduce_sums: adds up sums and counts over the devices' samples before division.
    """

    around: Callable[[nnx.GraphDef[DiT], Params], DiT] = with_params
    make_cache: Callable[..., KVCache] = empty_cache
    reduce_sums: Callable[[Any], Any] = lambda sums: sums


@dataclasses.dataclass(frozen=True)
class DMDSetup:
    """Everything that stays the same from batch to batch.

    Attributes:
      graphdef: structure of the model, the same for student, critic and teacher.
      latent_shape: height, width and channels of a latent frame.
      chunk_frames: latent frames of a chunk.
      rollout: how the student samples.
      scores: how teacher and critic score.
      attention_for: tokens -> self-attention over sequences of them.
      attend: attention of the rollout and of the pass with the gradient.
      options: further arguments of `DiT.__call__` with a gradient, such as `remat`.
      shards: how devices divide the work.
    """

    graphdef: nnx.GraphDef[DiT]
    latent_shape: tuple[int, int, int]
    chunk_frames: int
    rollout: RolloutSpec
    scores: ScoreSpec
    attention_for: Callable[[Any], AttentionFn]
    attend: AttentionFn = attention
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    shards: Shards = Shards()

    def model(self, params: Params) -> DiT:
        """The model with these parameters."""
        return self.shards.around(self.graphdef, params)

    def video_shape(self, batch: int) -> tuple[int, int, int, int, int]:
        """Shape [b, f, h, w, c] of the latents of a batch."""
        return (batch, self.rollout.chunks * self.chunk_frames, *self.latent_shape)

    def score(self, *, trains: bool) -> ScoreFn:
        """The score of a model, with or without a gradient to its parameters."""
        return ScoreFn(
            self.scores, self.chunk_frames, self.attention_for, self.options if trains else {}
        )


def scene_of(batch: PromptBatch, text_features: Float[Array, "*b p t e"]) -> tuple[Scene, Array]:
    """What the videos show, and the features [b, 1, t, e] of the negative prompt."""
    if text_features.ndim == 3:
        text = text_features[batch.prompt]
        negative = jnp.broadcast_to(text_features[-1:], (len(text), *text_features[-1:].shape))
    else:
        text = jnp.take_along_axis(text_features, batch.prompt[:, :, None, None], axis=1)
        negative = text_features[:, -1:]
    return Scene(text, batch.cut, batch.first_frame), negative


def generator_loss(
    setup: DMDSetup,
    student: Params,
    teacher: Params,
    critic: Params,
    scene: Scene,
    negative: Array,
    rollout_draws: RolloutDraws,
    score_draws: ScoreDraws,
) -> tuple[Float[Array, ""], Metrics]:
    """Loss whose gradient is that of distribution matching, and metrics.

    The video that is scored is the output of the pass with the gradient: in W4A4 it differs from
    the rollout's by the rounding of the activations.
    """
    # 1. The student's video, with a gradient.
    x = generated(setup, student, scene, rollout_draws)
    # 2. Both scores at one noise level.
    fixed = lax.stop_gradient(x)
    noisy, score = add_noise(fixed, scene, score_draws), setup.score(trains=False)
    fake = critic_x0(score, setup.model(critic), noisy, fixed, scene, score_draws)
    real = teacher_x0(score, setup.model(teacher), noisy, fixed, scene, negative, score_draws)
    return matching_loss(setup, x, lax.stop_gradient(fake), lax.stop_gradient(real), scene)


def rolled_out(setup: DMDSetup, student: Params, scene: Scene, draws: RolloutDraws) -> Rollout:
    """The student's rollout, without a gradient and without dropout."""
    dit = setup.model(lax.stop_gradient(without_dropout(student)))
    options: Any = {"chunk_frames": setup.chunk_frames, "attend": setup.attend}
    options |= {"make_cache": setup.shards.make_cache}
    return lax.stop_gradient(rollout(dit, scene, draws, setup.rollout, **options))


def generated(
    setup: DMDSetup, student: Params, scene: Scene, draws: RolloutDraws
) -> Float[Array, "b f h w c"]:
    """The student's video with a gradient to its parameters."""
    rolled = rolled_out(setup, student, scene, draws)
    options: Any = {"chunk_frames": setup.chunk_frames, "attend": setup.attend, **setup.options}
    return student_pass(setup.model(student), scene, rolled, setup.rollout, **options)


def matching_loss(
    setup: DMDSetup,
    x: Float[Array, "b f h w c"],
    fake: Float[Array, "b f h w c"],
    real: Float[Array, "b f h w c"],
    scene: Scene,
    *,
    mask: Float[Array, "b f h w c"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """`0.5 mean (x - stop_gradient(x - g))^2` over the frames in the loss, and metrics."""
    gradient, norm = matching_gradient(
        lax.stop_gradient(x), fake, real, chunk_frames=setup.chunk_frames
    )
    weight = frames_in_loss(x.shape, scene)[:, :, None, None, None] * jnp.ones(x.shape)
    if mask is not None:
        weight = weight * mask
    target = lax.stop_gradient(x - gradient)
    sums = {
        "loss": (0.5 * jnp.sum(weight * (x - target) ** 2), jnp.sum(weight)),
        "matching_gradient": (jnp.sum(weight * gradient**2), jnp.sum(weight)),
        "score_distance": (jnp.sum(weight * (fake - real) ** 2), jnp.sum(weight)),
        "teacher_distance": (jnp.sum(norm), jnp.asarray(float(norm.size))),
    }
    sums = setup.shards.reduce_sums(sums)
    means = {k: total / jnp.maximum(count, 1) for k, (total, count) in sums.items()}
    loss = means.pop("loss")
    roots = {k: jnp.sqrt(means[k]) for k in ("matching_gradient", "score_distance")}
    return loss, means | roots


def critic_loss(
    setup: DMDSetup,
    student: Params,
    critic: Params,
    scene: Scene,
    rollout_draws: RolloutDraws,
    score_draws: ScoreDraws,
) -> tuple[Float[Array, ""], Metrics]:
    """Loss of the critic on a new video of the student, and metrics."""
    x = rolled_out(setup, student, scene, rollout_draws).x0
    return score_loss(setup, critic, x, scene, score_draws)


def score_loss(
    setup: DMDSetup,
    critic: Params,
    x: Float[Array, "b f h w c"],
    scene: Scene,
    draws: ScoreDraws,
) -> tuple[Float[Array, ""], Metrics]:
    """Mean squared error of the critic's velocity on a video of the student, and metrics.

    The error of a range of noise levels that no frame has is NaN.
    """
    noisy = add_noise(x, scene, draws)
    velocity = setup.score(trains=True)(
        setup.model(critic), noisy, x, draws.timestep, scene.text, scene.cut
    )
    error = jnp.mean((velocity - score_target(x, draws)) ** 2, axis=(2, 3, 4))
    weight = frames_in_loss(x.shape, scene)
    ranges = {
        name: weight * (draws.sigma >= low) * (draws.sigma < high)
        for name, (low, high) in _LEVELS.items()
    }
    sums = {k: (jnp.sum(error * w), jnp.sum(w)) for k, w in {"loss": weight, **ranges}.items()}
    sums = setup.shards.reduce_sums(sums)
    means = {k: total / jnp.maximum(count, 1) for k, (total, count) in sums.items()}
    levels = {k: jnp.where(sums[k][1] > 0, means[k], jnp.nan) for k in ranges}
    return means["loss"], levels


def frames_in_loss(shape: tuple[int, ...], scene: Scene) -> Float[Array, "b f"]:
    """1 for every frame that is generated, 0 for a given first frame."""
    weight = jnp.ones(shape[:2])
    return weight if scene.first_frame is None else weight.at[:, 0].set(0.0)
