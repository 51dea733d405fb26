"""Optimizers and learning-rate schedules: an optax chain from a spec."""

import dataclasses

import jax
import optax
from optax import contrib

from longlive_jax.training.state import Params


@dataclasses.dataclass(frozen=True)
class OptimSpec:
    """AdamW as in the paper (section 4.1), or Muon for matrices and Adam for other parameters.

    Attributes:
      name: "adamw" or "muon".
      lr: peak learning rate (with Muon, of the matrices only).
      adam_lr: peak learning rate of the parameters that Muon leaves to Adam.
      b1: decay rate of Adam's first moment.
      b2: decay rate of Adam's second moment.
      weight_decay: decoupled weight decay.
      warmup: number of linear warm-up steps.
      decay: final fraction of the run in which the rate decays linearly to zero (0: no decay).
      clip: maximum global gradient norm; larger gradients are scaled down to it.
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
            raise ValueError(f"optim.decay must be a fraction from 0 to 1, got {self.decay}")
        for name in ("lr", "adam_lr", "weight_decay"):
            if not 0 <= getattr(self, name) <= 100:
                raise ValueError(f"optim.{name} must be from 0 to 100, got {getattr(self, name)}")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} must be in [0, 1), got {getattr(self, name)}")
        if self.warmup < 0 or not self.clip > 0:
            raise ValueError(
                f"optim.warmup must be >= 0 and optim.clip > 0, got {self.warmup} and {self.clip}"
            )


def schedule(lr: float, spec: OptimSpec, steps: int) -> optax.Schedule:
    """Linear warm-up, constant, then linear decay to zero over the last `decay` of `steps`."""
    decay_steps = max(1, min(round(spec.decay * steps), steps - spec.warmup))
    pieces = [
        optax.linear_schedule(lr / max(1, spec.warmup), lr, max(1, spec.warmup)),
        optax.constant_schedule(lr),
        optax.linear_schedule(lr, 0.0 if spec.decay else lr, decay_steps),
    ]
    return optax.join_schedules(pieces, [spec.warmup, steps - decay_steps])


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
    """The axes of each leaf that form a matrix for Muon, or None for leaves left to Adam.

    Every `kernel` is a matrix, with convolution taps merged into its input axes; except the head's,
    whose outputs have a scale of their own that orthogonalised updates ignore. Leaves under
    `blocks` are stacked over layers, so their first axis is a batch axis.
    """

    def axes(path, leaf):
        names = [str(getattr(key, "key", key)) for key in path]
        if names[-1] != "kernel" or "head" in names:
            return None
        first = 1 if "blocks" in names else 0
        inputs = tuple(range(first, leaf.ndim - 1))
        return contrib.MuonDimensionNumbers(inputs, (leaf.ndim - 1,))

    return jax.tree_util.tree_map_with_path(axes, params)
