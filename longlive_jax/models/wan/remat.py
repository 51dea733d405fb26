"""Rematerialization: what a layer keeps for its gradient, by name."""

from collections.abc import Callable
from typing import Any, Literal

import jax

from pallas_kernels.attention.saved import SAVED

Remat = Literal["none", "attention_saved", "everything"]
"""What the backward pass computes again of a layer.

"none" keeps all that the gradient needs. "attention_saved" keeps a layer's input and the output and
log-sum-exp of its self-attention, so that attention runs forward once in a gradient. "everything"
keeps the input only.
"""


def checkpointed(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """The layer, a body of a scan, with what it keeps limited to the policy."""
    if remat == "none":
        return layer
    keep = () if remat == "everything" else SAVED
    policy = jax.checkpoint_policies.save_only_these_names(*keep)
    return jax.checkpoint(layer, prevent_cse=False, policy=policy)
