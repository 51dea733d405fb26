"""The loss of a LoRA: that of the model with it, as a function of the adapter alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from longlive_jax.quant.frozen import with_rounding_keys
from longlive_jax.quant.lora import LoRASpec, with_adapter
from longlive_jax.training.update import LossFn, Metrics
from longlive_jax.typing import Array, Float, Params

__all__ = ["AdaptedLoss", "adapted_for_loss"]

_DROPOUT = 0x4C52
"""Folded into a key, so that dropout is independent of the loss's use of the same key."""


@dataclasses.dataclass(frozen=True)
class AdaptedLoss:
    """A `LossFn` of an adapter, from the loss of complete parameters.

    Attributes:
      loss: the loss; its parameters are the frozen ones with a branch on every adapted kernel.
      spec: settings of the adapter.
      base: name of the frozen parameters.
      axes: mesh axes over which tokens are sharded; () outside of `shard_map`.
    """

    loss: LossFn
    spec: LoRASpec
    base: str
    axes: tuple[str, ...] = ()

    def __call__(
        self, params: Params, batch: Any, key: Array, loss_state: Any, frozen: Mapping[str, Params]
    ) -> tuple[Float[Array, ""], tuple[Metrics, Any]]:
        """`(loss, (metrics, loss_state))` of the adapter `params`."""
        adapted = adapted_for_loss(frozen[self.base], params, self.spec, key, axes=self.axes)
        return self.loss(adapted, batch, key, loss_state, frozen)


def adapted_for_loss(
    base: Params, adapter: Params, spec: LoRASpec, key: Array, *, axes: tuple[str, ...] = ()
) -> Params:
    """The frozen parameters with the adapter, its dropout, and keys to round gradients with.

    They depend on `key` alone. Raises ValueError if the adapter does not fit.
    """
    dropout_key = jax.random.fold_in(key, _DROPOUT) if spec.dropout else None
    rounding = with_rounding_keys(base, key)
    return with_adapter(rounding, adapter, spec, key=dropout_key, axes=axes)
