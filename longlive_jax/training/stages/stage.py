"""The base class of stages: settings that all of them have, and how a stage becomes a `Task`."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import optax
from jax.sharding import Mesh

from longlive_jax.parallel.mesh import MeshSpec
from longlive_jax.training.loop import LoopSpec
from longlive_jax.training.optim import OptimSpec, make_optimizer
from longlive_jax.training.task import Task
from longlive_jax.training.update import EMASpec, Group, LossState, Trainer

HELD_OUT_SEED = 2**31
"""Seed of held-out data, outside of the usual range of `loop.seed`."""


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """Settings that all stages have.

    Attributes:
      loop: length of the run and its intervals.
      optim: optimizer.
      ema: EMA of the trained parameters, or None.
      mesh: number of devices along each axis.
      save_dtype: dtype of the exported parameters.
    """

    loop: LoopSpec = dataclasses.field(default_factory=LoopSpec)
    optim: OptimSpec = dataclasses.field(default_factory=OptimSpec)
    ema: EMASpec | None = dataclasses.field(default_factory=EMASpec)
    mesh: MeshSpec = dataclasses.field(default_factory=MeshSpec)
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def task(self, out: pathlib.Path, workdir: pathlib.Path, mesh: Mesh) -> Task:
        """What to train.

        `out` is the checkpoint directory with the output of earlier stages, `workdir` a place for
        cached data.
        """
        raise TypeError(f"{type(self).__name__} is not a stage")

    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the run, whose schedule has its number of steps."""
        return make_optimizer(self.optim, self.loop.steps)

    def trainer(
        self, groups: Mapping[str, Group], mesh: Mesh, loss_state: LossState | None = None
    ) -> Trainer:
        """State and updates of these groups, with the run's seed and gradient accumulation."""
        loop = self.loop
        return Trainer(
            groups, mesh, seed=loop.seed, accumulate=loop.accumulate, loss_state=loss_state
        )

    def provenance(self, stage: str) -> dict[str, Any]:
        """What the exported checkpoint records of this run."""
        return {"stage": stage, "steps": self.loop.steps, "seed": self.loop.seed}

    def check_data_parallel(self, *batch_sizes: int) -> None:
        """Raises ValueError for a mesh that this stage does not support.

        Only mesh.data may exceed 1, and the samples of a microbatch must divide over it.
        """
        for axis, size in (("sp", self.mesh.sp), ("fsdp", self.mesh.fsdp)):
            if size != 1:
                raise ValueError(f"mesh.{axis} must be 1 in this stage, got {size}")
        for batch_size in batch_sizes:
            rows = microbatch_size(batch_size, self.loop.accumulate)
            if rows % self.mesh.data:
                raise ValueError(
                    f"{rows} samples of a microbatch do not divide over mesh.data = "
                    f"{self.mesh.data}; choose a divisor"
                )


def microbatch_size(batch_size: int, accumulate: int) -> int:
    """Samples per microbatch; raises ValueError if the batch does not divide into microbatches."""
    if batch_size % accumulate:
        raise ValueError(
            f"batch = {batch_size} does not divide by loop.accumulate = {accumulate}; choose a "
            "multiple"
        )
    return batch_size // accumulate
