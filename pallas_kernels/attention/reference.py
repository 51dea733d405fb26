"""Reference attention: dense masked softmax in float32."""

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
    """Masked softmax(q k^T / sqrt(d)) v; fully masked queries give zeros."""
    return attend_with_lse(q, k, v, q_tokens, k_tokens)[0]


def attend_with_lse(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
) -> tuple[Float[Array, "b q n d"], Float[Array, "b q n"]]:
    """`attend` and the log-sum-exp of each query's visible logits; -inf for fully masked queries.

    The log-sum-exp is the natural one of q k^T / sqrt(d), in float32. It merges attention over
    disjoint sets of keys: out = sum_i exp(lse_i - lse) out_i with lse = logsumexp_i lse_i.
    """
    q, k, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k) * q.shape[-1] ** -0.5
    if q_tokens is not None and k_tokens is not None:
        mask = visible(q_tokens, k_tokens)
        mask = mask[:, None] if mask.ndim == 3 else mask
        weights = jax.nn.softmax(logits, axis=-1, where=mask)
        weights = jnp.where(mask, weights, 0.0)
        any_visible = jnp.any(mask, axis=-1)
        # Fully masked rows sum over all keys first, so that no gradient is NaN.
        lse = jax.nn.logsumexp(logits, axis=-1, where=mask | ~any_visible[..., None])
        lse = jnp.where(any_visible, lse, -jnp.inf)
    else:
        weights = jax.nn.softmax(logits, axis=-1)
        lse = jax.nn.logsumexp(logits, axis=-1)
    out = jnp.einsum("bnqk,bknd->bqnd", weights, v32).astype(v.dtype)
    return out, jnp.swapaxes(lse, 1, 2)
