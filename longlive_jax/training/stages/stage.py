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

    def only_data(self, *batches: int) -> None:
        """ValueError for a mesh that splits sequences or parameters, which this stage does not, or
        that one of the batches does not split over."""
        for axis, parts in (("sp", self.mesh.sp), ("fsdp", self.mesh.fsdp)):
            if parts != 1:
                raise ValueError(f"mesh.{axis} is {parts}; this stage splits batches alone: 1")
        for batch in batches:
            part = part_of(batch, self.loop.accumulate)
            if part % self.mesh.data:
                raise ValueError(
                    f"{part} samples in a batch do not split over mesh.data = {self.mesh.data}; "
                    "choose a divisor"
                )


def part_of(batch: int, accumulate: int) -> int:
    """Samples that are worked off at a time; ValueError if a batch does not split into parts."""
    if batch % accumulate:
        raise ValueError(
            f"batch = {batch} does not split into loop.accumulate = {accumulate} parts; choose a "
            "multiple"
        )
    return batch // accumulate
