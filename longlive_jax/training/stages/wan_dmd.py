"""Stage `dmd`: distils a DiT to few steps on the prompts of a store (paper, section 4.1)."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from longlive_jax.data.clips.encoders import check_encoded_by
from longlive_jax.data.clips.store import EncodedClips
from longlive_jax.io.completeness import require_components
from longlive_jax.models.vae import VAEConfig
from longlive_jax.models.wan import DiTConfig
from longlive_jax.spec import UserError, build, check_minimums
from longlive_jax.training.objectives.dmd.draws import PromptBatch
from longlive_jax.training.objectives.dmd.roles import TextFeatures
from longlive_jax.training.stages.distillation import DistillationSpec
from longlive_jax.training.stages.prompt_batches import (
    PromptBatchSpec,
    first_frame_shape,
    prompt_batches,
)
from longlive_jax.training.task import About, Task
from longlive_jax.typing import Array

__all__ = ["WanDMDStage", "prompt_inputs"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanDMDStage(DistillationSpec):
    """Distillation on encoded scripts; no videos are needed.

    Attributes:
      prompts: folder written by `longlive data encode --texts_only`, with the negative prompt.
      chunks_per_shot: chunks of each shot of scripts without durations; a script of one shot gets a
        cut after as many. 0: shots of equal lengths.
      image_to_video: whether the first frames of the store are given.
      workers: number of additional processes that read scripts (0: threads of this one).
    """

    prompts: str | None = None
    chunks_per_shot: int = 0
    image_to_video: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimums(self, chunks_per_shot=0, workers=0)

    def task(self, out: Path, workdir: Path, mesh: Mesh) -> Task:
        """See `RunSpec.task`.

        Raises UserError for prompts of another checkpoint or without the negative one, for a
        teacher of another family, and for a batch that does not divide.
        """
        # 1. Models and prompts.
        model, store = self.model(), self._store()
        setup = self.setup(
            model,
            self.rollout,
            latent_shape=self._latent_shape(model, store),
            chunk_frames=store.manifest.identity["join"]["chunk_frames"],
        )
        self.check(model, setup)
        batches = prompt_batches(store, mesh, self.batch_spec())
        # 2. Updates.
        trainer = self.trainer(self.groups(model, setup, prompt_inputs, mesh), mesh)
        frozen = self.frozen(model, mesh)
        origin = {"prompts": store.manifest.identity["dataset"]}
        return Task(
            trainer=trainer,
            batches=batches,
            evaluate=self.evaluation(model, frozen, self.sample_settings(self.rollout)),
            export=functools.partial(self.export, "dmd", self.rollout, origin),
            updates=self.updates,
            frozen=frozen,
            about=About(self.origin() | origin, self.notes(model)),
        )

    def batch_spec(self) -> PromptBatchSpec:
        """How scripts become batches."""
        return PromptBatchSpec(
            batch=self.batch,
            chunks=self.rollout.chunks,
            chunks_per_shot=self.chunks_per_shot,
            first_frames=self.image_to_video,
            accumulate=self.loop.accumulate,
            seed=self.loop.seed,
            workers=self.workers,
        )

    def _store(self) -> EncodedClips:
        """The prompts, encoded by the checkpoint's text encoder."""
        if self.prompts is None:
            raise UserError(
                "config.prompts is not set; encode prompts by `longlive data encode --texts_only` "
                "and give their folder by --config.prompts=FOLDER"
            )
        store = EncodedClips(self.prompts)
        check_encoded_by(store, self.base)
        return store

    def _latent_shape(self, model: DiTConfig, store: EncodedClips) -> tuple[int, int, int]:
        """Height, width and channels of the latents that are sampled."""
        settings = require_components(self.base, "vae")["components"]["vae"]
        stride = build(VAEConfig, settings, path=f"{self.base}: vae").spatial_stride
        height, width = (side // stride for side in store.manifest.identity["size"])
        shape = (height, width, model.in_channels)
        if self.image_to_video and (first := first_frame_shape(store)) != shape:
            raise UserError(
                f"{store.folder}: its first frames are {first}, and the model samples {shape}; "
                "encode them with this checkpoint into another folder"
            )
        return shape


def prompt_inputs(arrays: Mapping[str, Array]) -> tuple[PromptBatch, TextFeatures]:
    """The batch and its text features, from the arrays of `prompt_batches`."""
    rest: dict[str, Any] = {k: x for k, x in arrays.items() if k != "text_features"}
    return PromptBatch(**rest), arrays["text_features"]
