"""Attention for one layout of tokens, made once and used in every layer.

What an implementation derives from the tokens (the tile maps of the kernels) depends on nothing
that a layer computes. `lay_out` derives it where it is called: outside of the scan over layers.
"""

from typing import Any

import flax.struct
from jaxtyping import Array, Float

from pallas_kernels.attention.api import attention, attention_with_lse, check, which
from pallas_kernels.dispatch import Implementation
from pallas_kernels.tokens import Tokens


@flax.struct.dataclass
class Layout:
    """An `AttentionFn` of the tokens that it was made with; a pytree, so it may cross `jit`.

    Tokens given to a call, as the model does, are not read: they must be the same ones.
    """

    q_tokens: Tokens
    k_tokens: Tokens
    mask: Any
    """Columns and tile maps of the kernels; None for implementations that have none."""
    implementation: Implementation = flax.struct.field(pytree_node=False, default="auto")

    def __call__(
        self,
        q: Float[Array, "b q n d"],
        k: Float[Array, "b k n d"],
        v: Float[Array, "b k n d"],
        q_tokens: Tokens | None = None,
        k_tokens: Tokens | None = None,
    ) -> Float[Array, "b q n d"]:
        """`attention` with this layout's tokens and implementation."""
        if self.mask is None:
            tokens = self.q_tokens, self.k_tokens
            return attention(q, k, v, *tokens, implementation=self.implementation)
        return self.with_lse(q, k, v)[0]

    def with_lse(
        self, q: Float[Array, "b q n d"], k: Float[Array, "b k n d"], v: Float[Array, "b k n d"]
    ) -> tuple[Float[Array, "b q n d"], Float[Array, "b q n"]]:
        """`attention_with_lse` with this layout's tokens and implementation."""
        tokens = self.q_tokens, self.k_tokens
        if self.mask is None:
            return attention_with_lse(q, k, v, *tokens, implementation=self.implementation)
        check(q, k, *tokens)
        which(q, k, v, *tokens, implementation=self.implementation)
        from pallas_kernels.attention.mosaic import op

        return op.attend_mask(q, k, v, self.mask)


def lay_out(
    q_tokens: Tokens, k_tokens: Tokens, *, implementation: Implementation = "auto"
) -> Layout:
    """`attention(..., q_tokens, k_tokens)` with everything that follows from the tokens made now.

    Raises `Unsupported` if "mosaic" is named where the chip at hand has no kernels. Make it where
    the tokens are made: once a layout if they are known, once a step if they are traced.
    """
    mask = None
    if implementation == "mosaic":
        from pallas_kernels.attention.mosaic import op  # half a second that others need not spend

        mask = op.mask_of(q_tokens, k_tokens)
    return Layout(q_tokens, k_tokens, mask, implementation)
