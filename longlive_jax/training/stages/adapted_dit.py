"""An adapter is trained over a DiT that stays as it is in its checkpoint (LoRA).

The frozen DiT is read once (`backbones`). It is an argument of the update, neither donated nor
saved.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from longlive_jax.io.builtin import find_checkpoint
from longlive_jax.io.packed_kernels import read_quantization
from longlive_jax.parallel import rules
from longlive_jax.quant.frozen import frozen_specs, with_axes, with_rounding_keys
from longlive_jax.quant.lora import (
    LoRASpec,
    adapter_specs,
    init_adapter,
    num_adapted,
    with_adapter,
)
from longlive_jax.quant.policy import QuantPolicy, QuantSpec
from longlive_jax.spec import UserError
from longlive_jax.training.objectives.adapted import AdaptedLoss
from longlive_jax.training.stages.backbones import FrozenForm, read_backbone
from longlive_jax.training.state import abstract_state
from longlive_jax.training.update import Group, LossFn
from longlive_jax.typing import Array, Params
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.nvfp4 import linear_implementation

__all__ = ["BASE", "AdaptedDiT"]

BASE = "base"
"""Name of the DiT among a task's frozen parameters."""


@dataclasses.dataclass(frozen=True)
class AdaptedDiT:
    """A `DiTTraining` of an adapter.

    Attributes:
      lora: settings of the adapter.
      quant: formats of the frozen matrices.
      dtype: dtype of those that are not packed.
      shapes: shapes of the DiT's parameters.
      mesh: devices of the run.
      checkpoint: checkpoint directory of the DiT, or the name of a built-in one.
      axes: mesh axes over which tokens are sharded; () on one device.
    """

    lora: LoRASpec
    quant: QuantSpec
    dtype: str
    shapes: Params
    mesh: Mesh
    checkpoint: str
    axes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError for an adapter, or a policy, that does not fit model and mesh, and for
        an implementation that is not available here.
        """
        try:
            _check_policy(self.policy, self.quant)
            _check_targets(self.lora, self.adapter)
            rules.check_divides(
                self.mesh, rules.specs_for(rules.ADAPTER, self.adapter), self.adapter
            )
            _ = self._backbone
        except (ValueError, Unsupported) as error:
            raise UserError(f"config.{error}") from error

    @property
    def name(self) -> str:
        """See `DiTTraining`."""
        return "adapter"

    @property
    def policy(self) -> QuantPolicy:
        """The formats of the frozen matrices."""
        return self.form.quantization

    @property
    def form(self) -> FrozenForm:
        """The form of the frozen parameters."""
        return FrozenForm(
            policy=self.quant.policy,
            gradient=True,
            dtype=self.dtype,
            implementation=self.quant.implementation,
        )

    @functools.cached_property
    def adapter(self) -> Params:
        """See `DiTTraining`. Raises ValueError if it does not fit the model."""
        return jax.eval_shape(lambda: init_adapter(jax.random.key(0), self.shapes, self.lora))

    def group(self, loss: LossFn, **options: Any) -> Group:
        """See `DiTTraining`."""
        return Group(
            init=functools.partial(init_adapter, params=self.shapes, spec=self.lora),
            loss=AdaptedLoss(loss, self.lora, BASE, self.axes),
            rules=rules.ADAPTER,
            **options,
        )

    def specs(self, *, training: bool) -> rules.Specs:
        """See `DiTTraining`; in training there are keys for rounding and dropout."""
        base, _ = self._backbone
        if training:
            base = jax.eval_shape(lambda x: with_rounding_keys(x, jax.random.key(0)), base)
        return adapter_specs(
            frozen_specs(base, rules.specs_for(rules.DIT, self.shapes)),
            rules.specs_for(rules.ADAPTER, self.adapter),
            self.lora,
            dropout=training and self.lora.dropout > 0,
            axes=self.axes,
        )

    def frozen(self) -> dict[str, Params]:
        """See `DiTTraining`. Raises UserError for a checkpoint whose matrices are packed."""
        folder = find_checkpoint(self.checkpoint)
        if read_quantization(folder, "dit") is not None:
            raise UserError(
                f"{folder}: its DiT is packed; train the adapter on the checkpoint that it was "
                "packed from, with quant.policy to pack it for the run"
            )
        return {BASE: read_backbone(folder, self.shapes, self.form, self.mesh)}

    def frozen_shapes(self) -> dict[str, Params]:
        """See `DiTTraining`."""
        shapes, specs = self._backbone
        return {BASE: abstract_state(shapes, rules.shardings(self.mesh, specs))}

    def evaluated(self, weights: Params, frozen: Mapping[str, Params], key: Array) -> Params:
        """See `DiTTraining`; without dropout."""
        return with_adapter(with_axes(frozen[BASE], self.axes), weights, self.lora)

    def sampled(self, weights: Params, frozen: Mapping[str, Params]) -> Params:
        """See `DiTTraining`."""
        return with_adapter(with_axes(frozen[BASE], ()), weights, self.lora)

    def on_one_device(self) -> "AdaptedDiT":
        """See `DiTTraining`."""
        return dataclasses.replace(self, axes=())

    def describe(self) -> str:
        """See `DiTTraining`."""
        count = sum(x.size for x in jax.tree.leaves(self.adapter))
        matrices = num_adapted(self.adapter)
        kind = self.policy.describe(self.shapes) if self.policy.rules else f"in {self.dtype}"
        return (
            f"LoRA of rank {self.lora.rank} on {matrices} matrices, {count / 1e6:.1f} M "
            f"parameters; the model is frozen, {kind}"
        )

    @functools.cached_property
    def _backbone(self) -> tuple[Params, Any]:
        """Shapes and PartitionSpecs of the frozen parameters."""
        return self.form.abstract(self.shapes, self.mesh)


def _check_targets(lora: LoRASpec, adapter: Params) -> None:
    """Raises ValueError for kernels outside of the blocks, which files of adapters cannot have."""
    if others := sorted(set(adapter) - {"blocks"}):
        raise ValueError(
            f"lora.targets {lora.targets!r} matches kernels of {', '.join(others)}; only those of "
            "the blocks can be adapted, such as 'blocks/.*/kernel'"
        )


def _check_policy(policy: QuantPolicy, quant: QuantSpec) -> None:
    """Raises ValueError for a policy that trains its matrices or has no gradient."""
    for _, form in policy.rules:
        if form.kind == "nvfp4" and (form.recipe is None or not form.recipe.frozen):
            raise ValueError(
                f"quant.policy {policy.name} is not for frozen matrices; choose 'nvfp4_frozen', "
                "'fp8' or 'none' with lora"
            )
        if form.kind == "nvfp4":
            linear_implementation(quant.implementation, trains=False)
