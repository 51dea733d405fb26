"""Attention for fixed tokens, built once and used in every layer.

The tile maps of the kernels depend on the tokens only. `make_attention` computes them where it is
called, outside of the scan over layers.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.api import (
    attention,
    attention_with_lse,
    check_tokens,
    select_implementation,
)
from pallas_kernels.dispatch import Implementation, proven
from pallas_kernels.tokens import Tokens

SUPPORTED = jax.ShapeDtypeStruct((1, 1, 1, 128), jnp.bfloat16)
"""Queries that all kernels support, to ask whether "auto" may take them."""


@flax.struct.dataclass
class FixedMaskAttention:
    """An `AttentionFn` for fixed tokens; a pytree, so it can be an argument of a jitted function.

    Tokens passed to a call, as the model does, are ignored; they must be the same tokens.

    Attributes:
      q_tokens: query tokens.
      k_tokens: key tokens.
      mask: mask columns and tile maps of the kernels; None where they cannot be selected.
      implementation: implementation of the attention.
    """

    q_tokens: Tokens
    k_tokens: Tokens
    mask: Any
    implementation: Implementation = flax.struct.field(pytree_node=False, default="auto")

    def __call__(
        self,
        q: Float[Array, "b q n d"],
        k: Float[Array, "b k n d"],
        v: Float[Array, "b k n d"],
        q_tokens: Tokens | None = None,
        k_tokens: Tokens | None = None,
    ) -> Float[Array, "b q n d"]:
        """`attention` with the fixed tokens and implementation."""
        if self._selects_kernels(q, k, v):
            return self.with_lse(q, k, v)[0]
        tokens = self.q_tokens, self.k_tokens
        return attention(q, k, v, *tokens, implementation=self.implementation)

    def with_lse(
        self, q: Float[Array, "b q n d"], k: Float[Array, "b k n d"], v: Float[Array, "b k n d"]
    ) -> tuple[Float[Array, "b q n d"], Float[Array, "b q n"]]:
        """`attention_with_lse` with the fixed tokens and implementation."""
        tokens = self.q_tokens, self.k_tokens
        if not self._selects_kernels(q, k, v):
            return attention_with_lse(q, k, v, *tokens, implementation=self.implementation)
        from pallas_kernels.attention.mosaic import op

        return op.attend_mask(q, k, v, self.mask)

    def _selects_kernels(self, q: Array, k: Array, v: Array) -> bool:
        """Whether these arguments go to the kernels; "auto" may find them unsupported."""
        if self.mask is None:
            return False
        tokens = self.q_tokens, self.k_tokens
        check_tokens(q, k, *tokens)
        chosen = select_implementation(q, k, v, *tokens, implementation=self.implementation)
        return chosen == "mosaic"


def make_attention(
    q_tokens: Tokens, k_tokens: Tokens, *, implementation: Implementation = "auto"
) -> FixedMaskAttention:
    """Builds `attention(..., q_tokens, k_tokens)`, with its tile maps computed now.

    Call it where the tokens are built: once if they are concrete, once per step if they are traced.
    "auto" builds tile maps where it may select the kernels (`select_implementation`).
    Raises `Unsupported` if "mosaic" is named and the current device has no kernels.
    """
    mask = None
    if implementation == "mosaic" or (implementation == "auto" and proven("attention", SUPPORTED)):
        from pallas_kernels.attention.mosaic import op  # takes 0.5 s to import; only GPUs need it

        mask = op.make_mask(q_tokens, k_tokens)
    return FixedMaskAttention(q_tokens, k_tokens, mask, implementation)
