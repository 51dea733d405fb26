"""The roles of distillation, and the two losses as the trainer calls them.

Student and critic are frozen backbones with an adapter each, which the trainer updates; they share
one backbone where both start from the same weights. The teacher has no adapter.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from longlive_jax.quant.frozen import with_rounding_keys
from longlive_jax.quant.lora import LoRASpec, with_adapter
from longlive_jax.training.objectives.dmd.draws import (
    PromptBatch,
    RolloutDraws,
    ScoreDraws,
    draw_rollout,
    draw_scores,
)
from longlive_jax.training.objectives.dmd.losses import (
    DMDSetup,
    critic_loss,
    generator_loss,
    scene_of,
)
from longlive_jax.training.update import Metrics
from longlive_jax.typing import Array, Float, Key, Params

GENERATOR, CRITIC = "generator", "critic"
"""Names of the two trained adapters, which are groups of the trainer."""

STUDENT_BACKBONE, CRITIC_BACKBONE, TEACHER = "student_backbone", "critic_backbone", "teacher"
"""Names of frozen parameters; the critic's are absent where it shares the student's."""

type TextFeatures = Float[Array, "*b p t e"]
"""Text features: one table for all samples or one for each; the last row is the negative prompt."""

type Inputs = Callable[[Mapping[str, Array]], tuple[PromptBatch, TextFeatures]]
"""Arrays of a batch -> the batch and its text features."""


@dataclasses.dataclass(frozen=True)
class GeneratorLoss:
    """Distribution matching of the student: a `LossFn` of the generator's adapter.

    Attributes:
      setup: everything that stays the same.
      inputs: arrays of a batch -> the batch and its text features.
      lora: settings of both adapters.
      forward: the loss from parameters, scene and draws; over a mesh, `sharded_generator_loss`.
      axes: mesh axes over which tokens are sharded where `forward` runs, for dropout.
    """

    setup: DMDSetup
    inputs: Inputs
    lora: LoRASpec
    forward: Callable[..., tuple[Array, Metrics]] = generator_loss
    axes: tuple[str, ...] = ()

    def __call__(
        self,
        params: Params,
        batch: Mapping[str, Array],
        key: Key[Array, ""],
        loss_state: Any,
        frozen: Mapping[str, Params],
    ) -> tuple[Float[Array, ""], tuple[Metrics, Any]]:
        """`(loss, (metrics, loss_state))` of the adapter `params`."""
        # 1. Everything random.
        prompts, text_features = self.inputs(batch)
        draws, round_key = draws_for(self.setup, prompts, key)
        # 2. The three models.
        student = trained_params(frozen[STUDENT_BACKBONE], params, self.lora, round_key, self.axes)
        backbone = frozen.get(CRITIC_BACKBONE, frozen[STUDENT_BACKBONE])
        critic = with_adapter(backbone, frozen[CRITIC], self.lora)
        # 3. The loss.
        scene = scene_of(prompts, text_features)
        loss, metrics = self.forward(self.setup, student, frozen[TEACHER], critic, *scene, *draws)
        return loss, (metrics, loss_state)


@dataclasses.dataclass(frozen=True)
class CriticLoss:
    """Flow matching of the critic on the student's videos: a `LossFn` of the critic's adapter.

    Attributes:
      setup: everything that stays the same.
      inputs: arrays of a batch -> the batch and its text features.
      lora: settings of both adapters.
      forward: the loss from parameters, scene and draws; over a mesh, `sharded_critic_loss`.
      axes: mesh axes over which tokens are sharded where `forward` runs, for dropout.
    """

    setup: DMDSetup
    inputs: Inputs
    lora: LoRASpec
    forward: Callable[..., tuple[Array, Metrics]] = critic_loss
    axes: tuple[str, ...] = ()

    def __call__(
        self,
        params: Params,
        batch: Mapping[str, Array],
        key: Key[Array, ""],
        loss_state: Any,
        frozen: Mapping[str, Params],
    ) -> tuple[Float[Array, ""], tuple[Metrics, Any]]:
        """`(loss, (metrics, loss_state))` of the adapter `params`."""
        prompts, text_features = self.inputs(batch)
        draws, round_key = draws_for(self.setup, prompts, key)
        student = with_adapter(frozen[STUDENT_BACKBONE], frozen[GENERATOR], self.lora)
        backbone = frozen.get(CRITIC_BACKBONE, frozen[STUDENT_BACKBONE])
        critic = trained_params(backbone, params, self.lora, round_key, self.axes)
        scene, _ = scene_of(prompts, text_features)
        loss, metrics = self.forward(self.setup, student, critic, scene, *draws)
        return loss, (metrics, loss_state)


def draws_for(
    setup: DMDSetup, prompts: PromptBatch, key: Key[Array, ""]
) -> tuple[tuple[RolloutDraws, ScoreDraws], Key[Array, ""]]:
    """Draws of the rollout and of the scores, and the key of roundings and dropout."""
    rollout_key, score_key, round_key = jax.random.split(key, 3)
    shape = setup.video_shape(len(prompts.prompt))
    scores = draw_scores(
        score_key,
        setup.scores,
        shape,
        chunk_frames=setup.chunk_frames,
        image_to_video=prompts.first_frame is not None,
    )
    return (draw_rollout(rollout_key, setup.rollout, shape), scores), round_key


def trained_params(
    backbone: Params, adapter: Params, lora: LoRASpec, key: Array, axes: tuple[str, ...] = ()
) -> Params:
    """A frozen backbone with an adapter, for an evaluation with a gradient.

    `key` is that of the rounding of gradients and of the adapter's dropout; `axes` are those of
    `with_adapter`.
    """
    return with_adapter(with_rounding_keys(backbone, key), adapter, lora, key=key, axes=axes)
