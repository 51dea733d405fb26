"""What a training run carries from step to step, and how every part of it is sharded."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from longlive_jax.parallel.rules import Rules, moment_specs, specs_for
from longlive_jax.typing import Array, Int, Params

REPLICATED: Rules = ((r".*", P()),)
"""Every parameter on every device."""


@flax.struct.dataclass
class Trained:
    """A group of parameters that one optimizer trains.

    Attributes:
      params: float32 master parameters.
      ema: their exponential moving average, float32, or None.
      opt_state: the optimizer's state.
      bad_steps: consecutive updates skipped because loss or gradient were not finite.
    """

    params: Params
    ema: Params | None
    opt_state: Any
    bad_steps: Int[Array, ""]

    @property
    def weights(self) -> Params:
        """What is evaluated and exported: the EMA if there is one, else the parameters."""
        return self.params if self.ema is None else self.ema


@flax.struct.dataclass
class TrainState:
    """Everything an update reads and writes; saving it saves the run.

    Attributes:
      step: training steps attempted so far.
      groups: trained parameters by the name of their group.
      loss_state: what losses keep between steps (error buffers), or ().
    """

    step: Int[Array, ""]
    groups: dict[str, Trained]
    loss_state: Any = ()

    @property
    def weights(self) -> dict[str, Params]:
        """The weights of every group (`Trained.weights`)."""
        return {name: group.weights for name, group in self.groups.items()}


def init_group(params: Params, tx: optax.GradientTransformation, *, ema: bool) -> Trained:
    """A group before its first update; the EMA starts as a copy, so both can be donated."""
    ema_params = jax.tree.map(jnp.copy, params) if ema else None
    return Trained(params, ema_params, tx.init(params), jnp.zeros((), jnp.int32))


def group_specs(shapes: Trained, tx: optax.GradientTransformation, rules: Rules) -> Trained:
    """PartitionSpecs of a group of these shapes: EMA and moments are sharded as their parameters.

    Raises ValueError for parameters that no rule names.
    """
    specs = specs_for(rules, shapes.params)
    moments = moment_specs(tx, shapes.params, specs)
    replicated: Any = P()
    return Trained(specs, None if shapes.ema is None else specs, moments, replicated)


def abstract_state(shapes: Any, shardings: Any) -> Any:
    """`jax.ShapeDtypeStruct` for every array of `shapes`, with its sharding."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )
