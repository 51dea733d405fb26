"""Stage `small_dmd`: distils the small world's DiT to few steps; no videos are needed."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from longlive_jax.io.checkpoint import TOKENIZER
from longlive_jax.io.completeness import require_components
from longlive_jax.io.models import load_model
from longlive_jax.models.umt5 import Tokenizer, encode_prompts
from longlive_jax.models.vae import VAEConfig
from longlive_jax.models.wan import DiTConfig
from longlive_jax.sampling.settings import SampleSpec, spec_for
from longlive_jax.small_world.windows import chunk_prompts, prompt_table
from longlive_jax.small_world.world import sample_spec
from longlive_jax.spec import build
from longlive_jax.training.feed import feed_in_order
from longlive_jax.training.objectives.dmd.draws import PromptBatch, RolloutSpec
from longlive_jax.training.stages.distillation import DistillationSpec
from longlive_jax.training.task import About, Task, global_batches
from longlive_jax.typing import Array

__all__ = ["ScriptBatches", "SmallDMDStage"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallDMDStage(DistillationSpec):
    """Distillation on scripts of the small world.

    Attributes:
      shot_chunks: smallest and largest number of chunks of a shot.
      as_sampled: whether window, sinks and `shot_rope_offset` of the rollout are those of the
        checkpoint's sampling settings, in place of `rollout`'s.
    """

    checkpoint: str = "small_world"
    batch: int = 16
    shot_chunks: tuple[int, int] = (2, 6)
    as_sampled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.shot_chunks[0] <= self.shot_chunks[1]:
            raise ValueError(f"shot_chunks must be two rising numbers >= 1, got {self.shot_chunks}")
        if self.as_sampled and self.rollout.window is not None:
            raise ValueError(
                f"rollout.window is {self.rollout.window}, and as_sampled takes the checkpoint's; "
                "set as_sampled=false, or leave the window out"
            )

    def task(self, out: pathlib.Path, workdir: pathlib.Path, mesh: Mesh) -> Task:
        """See `RunSpec.task`. Raises UserError for models that do not fit batch and mesh."""
        # 1. The models, and how they sample.
        folder, model = self.base, self.model()
        require_components(folder, "vae", "umt5", TOKENIZER)
        own = spec_for(folder)
        rollout = self.rollout_of(own)
        setup = self.setup(
            model, rollout, latent_shape=self._latent_shape(own), chunk_frames=own.chunk_frames
        )
        self.check(model, setup)
        # 2. Prompts.
        text = self._text_features(model)
        batches = ScriptBatches(
            self.batch, rollout.chunks, self.shot_chunks, self.loop.steps, self.loop.seed
        )
        # 3. Updates.
        groups = self.groups(model, setup, lambda arrays: (PromptBatch(**arrays), text), mesh)
        trainer = self.trainer(groups, mesh)
        frozen = self.frozen(model, mesh)
        settings = self.sample_settings(rollout)
        return Task(
            trainer=trainer,
            batches=global_batches(feed_in_order(batches), mesh),
            evaluate=self.evaluation(model, frozen, settings),
            export=functools.partial(self.export, "small_dmd", rollout, {}),
            updates=self.updates,
            frozen=frozen,
            about=About(self.origin(), self.notes(model)),
        )

    def rollout_of(self, own: SampleSpec) -> RolloutSpec:
        """The rollout, with what it takes from the checkpoint's sampling settings."""
        if not self.as_sampled:
            return self.rollout
        names = ("window", "global_sinks", "shot_sinks", "shot_rope_offset")
        return dataclasses.replace(self.rollout, **{name: getattr(own, name) for name in names})

    def _latent_shape(self, own: SampleSpec) -> tuple[int, int, int]:
        settings = require_components(self.base, "vae")["components"]["vae"]
        vae = build(VAEConfig, settings, path=f"{self.base}: vae")
        height, width = (side // vae.spatial_stride for side in own.size)
        return height, width, vae.z_dim

    def _text_features(self, model: DiTConfig) -> Array:
        """Features [p, t, e] of every prompt; the last is the empty one, which is the negative."""
        umt5, tokenizer = load_model(self.base, "umt5"), Tokenizer(self.base / TOKENIZER)
        return jnp.asarray(encode_prompts(umt5, tokenizer, prompt_table(), length=model.text_len))


@dataclasses.dataclass(frozen=True)
class ScriptBatches(Sequence):
    """Batches of prompts as a function of their index, with the fields of `PromptBatch`.

    Attributes:
      batch: scripts per batch.
      chunks: chunks of a script.
      shot_chunks: smallest and largest number of chunks of a shot.
      steps: number of batches.
      seed: random seed.
    """

    batch: int
    chunks: int
    shot_chunks: tuple[int, int]
    steps: int
    seed: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, int(i)))
        specs = [
            sample_spec(rng, chunks=self.chunks, shot_chunks=self.shot_chunks)
            for _ in range(self.batch)
        ]
        prompt, shot = (np.stack(x) for x in zip(*map(chunk_prompts, specs), strict=True))
        return {"prompt": prompt, "cut": np.diff(shot, axis=1, prepend=0) > 0}
