"""What a training run carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from longlive_jax.typing import Array, Int

Params = Any  # a nested dict of arrays


@flax.struct.dataclass
class TrainState:
    """Everything an update reads and writes; saving it is saving the run.

    Attributes:
      step: updates attempted so far.
      params: float32 master parameters.
      ema: their exponential moving average, float32.
      opt_state: the optimizer's moments.
      bad_steps: updates in a row that were dropped because loss or gradient were not finite.
    """

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: Any
    bad_steps: Int[Array, ""]


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """A state at step 0. The average starts as a copy, so that both buffers can be donated."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, jax.tree.map(jnp.copy, params), tx.init(params), zero + 0)
