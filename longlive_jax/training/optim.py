"""Optimizers and learning-rate schedules, from a spec to an optax chain."""

import dataclasses

import jax
import optax
from optax import contrib

from longlive_jax.training.state import Params


@dataclasses.dataclass(frozen=True)
class OptimSpec:
    """AdamW as in the paper's section 4.1, or Muon for matrices with Adam for the rest.

    Attributes:
      name: "adamw" or "muon".
      lr: peak learning rate (of the matrices, for Muon).
      adam_lr: what Muon's non-matrices use.
      warmup: steps of linear warm-up.
      decay: last fraction of the run over which the rate falls linearly to zero (0: constant).
      clip: global gradient norm above which gradients are scaled down.
    """

    name: str = "adamw"
    lr: float = 1e-5
    adam_lr: float = 1e-3
    b1: float = 0.0
    b2: float = 0.999
    weight_decay: float = 0.01
    warmup: int = 0
    decay: float = 0.0
    clip: float = 10.0

    def __post_init__(self):
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"optim.name is {self.name!r}; choose 'adamw' or 'muon'")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"optim.decay is {self.decay}; give a fraction of the run, 0 to 1")


def schedule(lr: float, spec: OptimSpec, steps: int) -> optax.Schedule:
    """Linear warm-up, constant, then linear decay to zero over the last `decay` of `steps`."""
    falling = max(1, min(round(spec.decay * steps), steps - spec.warmup))
    pieces = [
        optax.linear_schedule(lr / max(1, spec.warmup), lr, max(1, spec.warmup)),
        optax.constant_schedule(lr),
        optax.linear_schedule(lr, 0.0 if spec.decay else lr, falling),
    ]
    return optax.join_schedules(pieces, [spec.warmup, steps - falling])


def make_optimizer(spec: OptimSpec, steps: int) -> optax.GradientTransformation:
    """The optax chain of `spec` for a run of `steps` updates."""
    rate = schedule(spec.lr, spec, steps)
    if spec.name == "adamw":
        core = optax.adamw(rate, b1=spec.b1, b2=spec.b2, weight_decay=spec.weight_decay)
    else:
        core = contrib.muon(
            rate,
            weight_decay=spec.weight_decay,
            adam_b1=spec.b1,
            adam_b2=spec.b2,
            adam_learning_rate=schedule(spec.adam_lr, spec, steps),
            muon_weight_dimension_numbers=matrix_axes,
        )
    return optax.chain(optax.clip_by_global_norm(spec.clip), core)


def matrix_axes(params: Params):
    """Which axes of each leaf form a matrix: every `kernel`, with taps joined to the inputs.

    The head's is none: its outputs have a scale of their own, which orthogonal steps ignore.
    Leaves under `blocks` are stacked over layers; their first axis is a batch of matrices.
    """

    def axes(path, leaf):
        names = [str(getattr(key, "key", key)) for key in path]
        if names[-1] != "kernel" or "head" in names:
            return None
        first = 1 if "blocks" in names else 0
        inputs = tuple(range(first, leaf.ndim - 1))
        return contrib.MuonDimensionNumbers(inputs, (leaf.ndim - 1,))

    return jax.tree_util.tree_map_with_path(axes, params)
