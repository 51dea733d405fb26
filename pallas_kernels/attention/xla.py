"""Attention in plain XLA operations: dense for small logits, else blocked."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.attention import blocked
from pallas_kernels.attention.blocked import MASKED_LOGIT, einsum_f32, log_sum
from pallas_kernels.dispatch import platform
from pallas_kernels.tokens import Tokens, visible, visible_keys

DENSE_BYTES = 1 << 26
"""Size of the float32 logits in bytes above which attention is blocked."""


def attend(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
    *,
    dense_bytes: int | None = None,
) -> Float[Array, "b q n d"]:
    """`reference.attend` with matrix products in the dtype of the arguments, gradient included.

    Differentiable in reverse mode. CPUs have no fast batched products of 16-bit operands with
    float32 accumulation, so on CPUs everything is float32.
    """
    return attend_with_lse(q, k, v, q_tokens, k_tokens, dense_bytes=dense_bytes)[0]


def attend_with_lse(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
    *,
    dense_bytes: int | None = None,
) -> tuple[Float[Array, "b q n d"], Float[Array, "b q n"]]:
    """`attend` and the log-sum-exp of `reference.attend_with_lse`."""
    if platform() == "cpu" and v.dtype != jnp.float32:
        q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
        out, lse = attend_with_lse(q32, k32, v32, q_tokens, k_tokens, dense_bytes=dense_bytes)
        return out.astype(v.dtype), lse
    if not is_blocked(q, k.shape[1], dense_bytes):
        return _dense(q, k, v, _mask(q_tokens, k_tokens))
    return blocked.attend_with_lse(q, k, v, q_tokens, k_tokens, per_head=platform() == "cpu")


def is_blocked(q: Array | jax.ShapeDtypeStruct, keys: int, dense_bytes: int | None = None) -> bool:
    """Whether the logits of these queries [b, q, n, d] exceed `DENSE_BYTES`."""
    b, length, n, _ = q.shape
    return 4 * b * n * length * keys > (DENSE_BYTES if dense_bytes is None else dense_bytes)


def _mask(q_tokens: Tokens | None, k_tokens: Tokens | None) -> Bool[Array, "#b #n #q k"] | None:
    """The mask, broadcastable to logits [b, n, q, k]; None without tokens."""
    if q_tokens is None or k_tokens is None:
        return None
    if q_tokens.uniform_mask:
        mask = visible_keys(q_tokens, k_tokens)
        return mask.reshape(-1, 1, 1, mask.shape[-1])
    mask = visible(q_tokens, k_tokens)
    return mask.reshape(-1, 1, *mask.shape[-2:])


def _dense(q, k, v, mask):
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    logits = _logits(q, k)
    if mask is not None:
        logits = jnp.where(mask, logits, MASKED_LOGIT)
    top = lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - top)
    if mask is not None:
        weights = jnp.where(mask, weights, 0.0)
    # Normalizing after the product touches [q, d] values instead of [q, k].
    total = weights.sum(-1)
    out = jnp.einsum("bnqk,bknd->bqnd", weights.astype(v.dtype), v)
    total, top = (jnp.swapaxes(x, 1, 2) for x in (total, top[..., 0]))
    out = (out.astype(jnp.float32) / jnp.maximum(total[..., None], 1e-30)).astype(v.dtype)
    return out, log_sum(top, total)


@jax.custom_vjp
def _logits(q: Float[Array, "b q n d"], k: Float[Array, "b k n d"]) -> Float[Array, "b n q k"]:
    """Float32 logits; the gradient's products take operands of the same dtype as the forward's."""
    return einsum_f32("bqnd,bknd->bnqk", q, k)


def _logits_backward(saved, gradient):
    q, k = saved
    gradient = gradient.astype(q.dtype)
    d_q, d_k = (
        einsum_f32("bnqk,bknd->bqnd", gradient, k),
        einsum_f32("bnqk,bqnd->bknd", gradient, q),
    )
    return d_q.astype(q.dtype), d_k.astype(k.dtype)


_logits.defvjp(lambda q, k: (_logits(q, k), (q, k)), _logits_backward)
