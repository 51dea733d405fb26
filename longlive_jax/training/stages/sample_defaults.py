"""Sampler settings that a stage stores in its checkpoint."""

import dataclasses
from typing import Any

from longlive_jax.sampling.settings import SolverName


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleDefaults:
    """Sampler settings stored in the checkpoint as its defaults.

    Attributes:
      solver: solver of the flow.
      num_steps: sampler steps per chunk.
      guidance: scale of classifier-free guidance.
    """

    solver: SolverName = "unipc"
    num_steps: int = 32
    guidance: float = 2.0

    def settings(self) -> dict[str, Any]:
        """The fields of `SampleSpec` that they set."""
        return {"solver": self.solver, "steps": self.num_steps, "guidance": self.guidance}


def autoregressive() -> SampleDefaults:
    """Settings of an autoregressive video model before distillation, as in the reference."""
    return SampleDefaults(solver="unipc", num_steps=50, guidance=3.0)
