"""Sampler settings that a stage stores in its checkpoint."""

import dataclasses
from typing import Any

from longlive_jax.sampling.settings import SolverName


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleDefaults:
    """Sampler settings stored in the checkpoint as its defaults.

    Attributes:
      solver: solver of the flow.
      steps: model calls per chunk.
      guidance: scale of classifier-free guidance.
    """

    solver: SolverName = "unipc"
    steps: int = 32
    guidance: float = 2.0

    def settings(self) -> dict[str, Any]:
        """The fields of `SampleSpec` that they set."""
        return dataclasses.asdict(self)


def autoregressive() -> SampleDefaults:
    """Settings of an autoregressive video model before distillation, as in the reference."""
    return SampleDefaults(solver="unipc", steps=50, guidance=3.0)
