"""All stages of training: specs, and how each becomes a `Task`.

A later stage reads what the earlier ones wrote to the same checkpoint directory.
"""

import dataclasses
import pathlib

import numpy as np
from jax.sharding import Mesh

from longlive_jax.data.small_world import world
from longlive_jax.data.small_world.text import world_tokenizer
from longlive_jax.models.umt5 import UMT5Config
from longlive_jax.models.vae import VAEConfig
from longlive_jax.training.ar_stage import ARStage
from longlive_jax.training.clips_stage import ClipsStage
from longlive_jax.training.loop import Task
from longlive_jax.training.run import HELD_OUT_SEED, RunSpec
from longlive_jax.training.text import CaptionBatches, text_task
from longlive_jax.training.vae import ClipBatches, Phase, VAELossSpec, vae_task


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEStage(RunSpec):
    """Stage `vae`: phases of images and clips; `loop.steps` must be their sum."""

    model: VAEConfig
    phases: tuple[Phase, ...]
    loss: VAELossSpec = dataclasses.field(default_factory=VAELossSpec)
    held_out_clips: int = 8
    cut_probability: float = 0.5
    subject_weight: float = 3.0  # pixels of the subject count 1 + this

    def __post_init__(self):
        self.only_data(*(phase.batch for phase in self.phases))
        total = sum(phase.steps for phase in self.phases)
        if total != self.loop.steps:
            raise ValueError(
                f"phases have {total} steps, loop.steps is {self.loop.steps}; make them equal"
            )

    def task(self, out: pathlib.Path, workdir: pathlib.Path, mesh: Mesh) -> Task:
        def clips(rng: np.random.Generator, batch: int, frames: int):
            video, cover = world.vae_clips(rng, batch, frames, self.cut_probability)
            return video, 1 + self.subject_weight * (cover > 0)[..., None].astype(np.float32)

        held_out, _ = clips(np.random.default_rng(HELD_OUT_SEED), self.held_out_clips, 61)
        batches = ClipBatches(clips, self.phases, self.loop.seed)
        return vae_task(
            self.model, batches, held_out, loss=self.loss, provenance=self.provenance("vae")
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextStage(RunSpec):
    """Stage `text`: the tokenizer, and the encoder trained to guess hidden words."""

    model: UMT5Config
    batch: int = 128

    def __post_init__(self):
        self.only_data(self.batch)

    def task(self, out: pathlib.Path, workdir: pathlib.Path, mesh: Mesh) -> Task:
        tokenizer = world_tokenizer()
        steps, seed = self.loop.steps, self.loop.seed
        batches = CaptionBatches(tokenizer, self.batch, steps=steps, seed=seed)
        return text_task(self.model, tokenizer, batches, provenance=self.provenance("text"))


STAGES: dict[str, type[RunSpec]] = {
    "vae": VAEStage,
    "text": TextStage,
    "ar": ARStage,
    "clips": ClipsStage,
}
