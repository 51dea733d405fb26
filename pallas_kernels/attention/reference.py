"""The oracle: dense float32 softmax over the visible pairs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.tokens import Tokens, visible


def attend(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
) -> Float[Array, "b q n d"]:
    """softmax(q k^T / sqrt(d)) v over visible pairs; a query that sees nothing gives zeros."""
    q, k, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k) * q.shape[-1] ** -0.5
    if q_tokens is not None and k_tokens is not None:
        seen = visible(q_tokens, k_tokens)
        seen = seen[:, None] if seen.ndim == 3 else seen
        weights = jax.nn.softmax(logits, axis=-1, where=seen)
        weights = jnp.where(seen, weights, 0.0)
    else:
        weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bnqk,bknd->bqnd", weights, v32).astype(v.dtype)
