"""What every stage's settings share, and how a stage becomes a `Task`."""

import dataclasses
import pathlib
from typing import Any, Literal

from jax.sharding import Mesh

from longlive_jax.parallel.mesh import MeshSpec
from longlive_jax.training.loop import LoopSpec, Task
from longlive_jax.training.optim import OptimSpec
from longlive_jax.training.step import EMASpec

HELD_OUT_SEED = 2**31


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """Settings of a run, whatever it trains."""

    loop: LoopSpec = dataclasses.field(default_factory=LoopSpec)
    optim: OptimSpec = dataclasses.field(default_factory=OptimSpec)
    ema: EMASpec = dataclasses.field(default_factory=EMASpec)
    mesh: MeshSpec = dataclasses.field(default_factory=MeshSpec)
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the exported parameters

    def task(self, out: pathlib.Path, workdir: pathlib.Path, mesh: Mesh) -> Task:
        """What to train, given the checkpoint directory so far and a place for cached data."""
        raise TypeError(f"{type(self).__name__} is no stage")

    def provenance(self, stage: str) -> dict[str, Any]:
        """What the checkpoint remembers of this run."""
        return {"stage": stage, "steps": self.loop.steps, "seed": self.loop.seed}

    def refuse_sp(self) -> None:
        """UserError for a mesh that splits sequences where there are none."""
        if self.mesh.sp != 1:
            raise ValueError(f"mesh.sp is {self.mesh.sp}; this stage has no sequence to split: 1")
