"""What a stage trains of a DiT: all of it, or an adapter (`adapted_dit`)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.io.checkpoint import load_component
from longlive_jax.parallel import rules
from longlive_jax.quant.training import QuantizedTraining
from longlive_jax.training.update import Group, LossFn
from longlive_jax.typing import Array, Params

__all__ = ["DiTTraining", "WholeDiT", "load_shards", "put_shards"]


class DiTTraining(Protocol):
    """What is trained of a DiT, and the form in which losses and samplers get its parameters."""

    @property
    def name(self) -> str:
        """Name of the trained group."""

    @property
    def adapter(self) -> Params | None:
        """Shapes of the adapter, if only an adapter is trained."""

    def group(self, loss: LossFn, **options: Any) -> Group:
        """The group, from a loss of complete parameters; `options` are further fields."""

    def specs(self, *, training: bool) -> rules.Specs:
        """PartitionSpecs of the parameters as the loss gets them, in training or evaluation."""

    def frozen(self) -> dict[str, Params]:
        """Parameters that no update changes, by name, read onto the mesh."""

    def frozen_shapes(self) -> dict[str, Params]:
        """Shapes and shardings of `frozen`."""

    def evaluated(self, weights: Params, frozen: Mapping[str, Params], key: Array) -> Params:
        """Parameters as the loss gets them in an evaluation, from the group's weights."""

    def sampled(self, weights: Params, frozen: Mapping[str, Params]) -> Params:
        """Parameters to sample with on one device, from the group's weights."""

    def on_one_device(self) -> "DiTTraining":
        """The same for losses that are computed on one device."""

    def describe(self) -> str:
        """One line: what is trained, and its precision."""


@dataclasses.dataclass(frozen=True)
class WholeDiT:
    """All parameters are trained.

    Attributes:
      shapes: shapes of the parameters.
      own_specs: their PartitionSpecs.
      quant: precision of the matrices.
      init: key -> float32 parameters.
      restore: reads the initial parameters onto the mesh, instead of `init`; or None.
    """

    shapes: Params
    own_specs: rules.Specs
    quant: QuantizedTraining
    init: Callable[[Array], Params]
    restore: Callable[[], Params] | None = None

    @property
    def name(self) -> str:
        """See `DiTTraining`."""
        return "dit"

    @property
    def adapter(self) -> Params | None:
        """See `DiTTraining`."""
        return None

    def group(self, loss: LossFn, **options: Any) -> Group:
        """See `DiTTraining`."""
        return Group(
            init=self.init,
            loss=loss,
            rules=rules.DIT,
            restore=self.restore,
            prepare=self.quant.prepare,
            **options,
        )

    def specs(self, *, training: bool) -> rules.Specs:
        """See `DiTTraining`."""
        return self.quant.specs(self.own_specs, self.shapes)

    def frozen(self) -> dict[str, Params]:
        """See `DiTTraining`."""
        return {}

    def frozen_shapes(self) -> dict[str, Params]:
        """See `DiTTraining`."""
        return {}

    def evaluated(self, weights: Params, frozen: Mapping[str, Params], key: Array) -> Params:
        """See `DiTTraining`."""
        return self.quant.prepare(weights)(weights, key)

    def sampled(self, weights: Params, frozen: Mapping[str, Params]) -> Params:
        """See `DiTTraining`."""
        return weights

    def on_one_device(self) -> "WholeDiT":
        """See `DiTTraining`."""
        return dataclasses.replace(self, quant=dataclasses.replace(self.quant, axes=()))

    def describe(self) -> str:
        """See `DiTTraining`."""
        return self.quant.describe(self.shapes)


def load_shards(checkpoint: Path, mesh: Mesh, specs: rules.Specs) -> Params:
    """A checkpoint's DiT in float32; every device gets its own shard, one array at a time."""

    def put(path: tuple[str, ...], value: np.ndarray) -> jax.Array:
        spec = functools.reduce(lambda tree, key: tree[key], path, specs)
        return put_shards(value, mesh, spec)

    return load_component(checkpoint, "dit", dtype=np.float32, put=put)[0]


def put_shards(value: np.ndarray, mesh: Mesh, spec: P) -> jax.Array:
    """The array on a mesh; this process copies the shards of its own devices."""
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
