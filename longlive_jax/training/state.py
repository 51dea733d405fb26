"""What a training run carries from step to step, and where every part of it lies."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.parallel.rules import Rules, check_divides, moment_specs, shardings, specs_for
from longlive_jax.typing import Array, Int

Params = Any  # a nested dict of arrays

WHOLE: Rules = ((r".*", P()),)
"""Every parameter whole on every device."""


@flax.struct.dataclass
class TrainState:
    """Everything an update reads and writes; saving it is saving the run.

    Attributes:
      step: updates attempted so far.
      params: float32 master parameters.
      ema: their exponential moving average, float32.
      opt_state: the optimizer's moments.
      bad_steps: updates in a row that were dropped because loss or gradient were not finite.
      memory: what the loss remembers between updates (error buffers), or ().
    """

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: Any
    bad_steps: Int[Array, ""]
    memory: Any = ()


def init_state(params: Params, tx: optax.GradientTransformation, memory: Any = ()) -> TrainState:
    """A state at step 0. The average starts as a copy, so that both buffers can be donated."""
    zero = jnp.zeros((), jnp.int32)
    average = jax.tree.map(jnp.copy, params)
    return TrainState(zero, params, average, tx.init(params), zero + 0, memory)


def state_specs(
    shapes: TrainState, tx: optax.GradientTransformation, rules: Rules, memory: Any = ()
) -> TrainState:
    """PartitionSpecs of a state of these shapes: average and moments lie as their parameters do.

    `memory` are the specs of `shapes.memory`. Raises ValueError for parameters no rule names.
    """
    specs = specs_for(rules, shapes.params)
    moments = moment_specs(tx, shapes.params, specs)
    whole: Any = P()
    return TrainState(whole, specs, specs, moments, whole, memory)


def make_state(
    init: Callable[[], Params],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rules: Rules,
    *,
    memory: Callable[[], Any] = tuple,
    memory_specs: Any = (),
    start: Callable[[], Params] | None = None,
) -> tuple[TrainState, TrainState]:
    """The state at step 0, made where it stays, never whole on one device; and its shardings.

    `start` gives the parameters in the place of `init`, lying on the mesh already.
    Raises ValueError for parameters that no rule names or that do not split over the mesh.
    """

    def made(params: Params) -> TrainState:
        return init_state(params, tx, memory())

    shapes = jax.eval_shape(lambda: made(init()))
    specs = state_specs(shapes, tx, rules, memory_specs)
    check_divides(mesh, specs.params, shapes.params)
    where = shardings(mesh, specs)
    if start is None:
        return jax.jit(lambda: made(init()), out_shardings=where)(), where
    return jax.jit(made, out_shardings=where, donate_argnums=0)(start()), where
