"""The updates of stage `dmd` for the planner: the real ones, over any devices, unallocated."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.models.wan import DiTConfig
from longlive_jax.parallel.mesh import BATCH
from longlive_jax.planning.step import Clip
from longlive_jax.training.objectives.dmd.losses import DMDSetup
from longlive_jax.training.stages.frozen_roles import FrozenRoles
from longlive_jax.training.stages.wan_dmd import WanDMDStage, prompt_inputs
from longlive_jax.training.state import abstract_state
from longlive_jax.training.update import Trainer
from longlive_jax.typing import Params

__all__ = ["PlannedDistillation"]


@dataclasses.dataclass(frozen=True)
class PlannedDistillation:
    """An update of a distillation, with ShapeDtypeStructs for arrays.

    Attributes:
      stage: settings of the run; its rollout has the chunks of `clip`.
      model: settings of student, critic and teacher.
      clip: shape of a video that the student samples.
      group: the group that the update trains.
    """

    stage: WanDMDStage
    model: DiTConfig
    clip: Clip
    group: str

    def roles(self) -> FrozenRoles:
        """The frozen models; their checkpoints need not exist."""
        stage = self.stage
        return FrozenRoles.of(
            Path(stage.checkpoint),
            Path(stage.teacher or stage.checkpoint),
            stage.precision,
            dtype=stage.dtype,
            share=stage.share_backbones,
        )

    def frozen(self, mesh: Mesh) -> dict[str, Params]:
        """Shapes and shardings of the frozen models on a mesh, by name."""
        return self.roles().abstract(self.stage.shapes(self.model), mesh)

    def trainer(self, mesh: Mesh) -> Trainer:
        """State and updates, as the stage builds them."""
        stage = self.stage
        return stage.trainer(stage.groups(self.model, self.setup(), prompt_inputs, mesh), mesh)

    def setup(self) -> DMDSetup:
        """What stays the same from batch to batch."""
        return self.stage.setup(
            self.model,
            self.stage.rollout,
            latent_shape=self.clip.size,
            chunk_frames=self.clip.chunk_frames,
        )

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of one batch; every chunk may have its own prompt."""
        rows, chunks, model = self.stage.batch, self.clip.chunks, self.model
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "prompt": ((rows, chunks), "int32"),
            "cut": ((rows, chunks), "bool"),
            "text_features": ((rows, chunks + 1, model.text_len, model.text_dim), "float32"),
        }
        if self.stage.image_to_video:
            shapes["first_frame"] = ((rows, *self.clip.size), "float32")
        return {k: jax.ShapeDtypeStruct(shape, dtype) for k, (shape, dtype) in shapes.items()}

    def jit_on(self, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
        """The jitted update on a mesh, and its arguments as shapes with shardings."""
        trainer, batch = self.trainer(mesh), self.batch()
        shardings = dict.fromkeys(batch, NamedSharding(mesh, P(BATCH)))
        arguments = trainer.abstract, self.frozen(mesh), abstract_state(batch, shardings)
        return trainer.program((self.group,)), arguments
