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
    return attend_with_lse(q, k, v, q_tokens, k_tokens)[0]


def attend_with_lse(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
) -> tuple[Float[Array, "b q n d"], Float[Array, "b q n"]]:
    """`attend`, and the log-sum-exp of each query's visible logits, -inf if it sees nothing.

    That is natural, in float32, of q k^T / sqrt(d). Parts of a softmax over disjoint sets of keys
    merge by it: out = sum_i exp(lse_i - lse) out_i with lse = logsumexp_i lse_i.
    """
    q, k, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k) * q.shape[-1] ** -0.5
    if q_tokens is not None and k_tokens is not None:
        seen = visible(q_tokens, k_tokens)
        seen = seen[:, None] if seen.ndim == 3 else seen
        weights = jax.nn.softmax(logits, axis=-1, where=seen)
        weights = jnp.where(seen, weights, 0.0)
        any_seen = jnp.any(seen, axis=-1)
        # Blind rows sum over everything first, so that no gradient is NaN.
        lse = jax.nn.logsumexp(logits, axis=-1, where=seen | ~any_seen[..., None])
        lse = jnp.where(any_seen, lse, -jnp.inf)
    else:
        weights = jax.nn.softmax(logits, axis=-1)
        lse = jax.nn.logsumexp(logits, axis=-1)
    out = jnp.einsum("bnqk,bknd->bqnd", weights, v32).astype(v.dtype)
    return out, jnp.swapaxes(lse, 1, 2)
