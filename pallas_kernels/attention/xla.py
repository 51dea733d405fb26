"""Attention in plain XLA operations: dense where that is small, else block by block.

The blocked form never holds a [queries, keys] array: an online softmax runs over blocks of keys
for one block of queries at a time, and both loops are rematerialised, so that its gradient needs
no more memory than its value (FlashAttention, arXiv:2205.14135, without the fused kernel).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.dispatch import platform
from pallas_kernels.tokens import Tokens, visible, visible_keys

DENSE_BYTES = 1 << 26
"""Logits larger than this are done in blocks: at 1920 queries x 7680 keys x 8 heads on a CPU that
is 1.7 times faster than dense."""
BLOCK = 512
"""Most queries and keys in a block."""
_NEVER = -1e30  # finite, so that a block without visible keys gives no NaN


def attend(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
    *,
    dense_bytes: int | None = None,
) -> Float[Array, "b q n d"]:
    """The same as `reference.attend`, with matrix products in the dtype of the arguments.

    CPUs have no fast batched products of 16-bit arguments into float32, so there it is all float32.
    """
    if platform() == "cpu" and v.dtype != jnp.float32:
        q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
        return attend(q32, k32, v32, q_tokens, k_tokens, dense_bytes=dense_bytes).astype(v.dtype)
    b, length, n, _ = q.shape
    limit = DENSE_BYTES if dense_bytes is None else dense_bytes
    if 4 * b * n * length * k.shape[1] <= limit:
        return _dense(q, k, v, _mask(q_tokens, k_tokens))
    return _blocked(q, k, v, q_tokens, k_tokens)


def _mask(q_tokens: Tokens | None, k_tokens: Tokens | None) -> Bool[Array, "#b #n #q k"] | None:
    """Broadcastable to logits [b, n, q, k]; None if everything is visible."""
    if q_tokens is None or k_tokens is None:
        return None
    if q_tokens.alike:
        seen = visible_keys(q_tokens, k_tokens)
        return seen.reshape(-1, 1, 1, seen.shape[-1])
    seen = visible(q_tokens, k_tokens)
    return seen.reshape(-1, 1, *seen.shape[-2:])


def _dense(q, k, v, seen):
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32)
    if seen is not None:
        logits = jnp.where(seen, logits, _NEVER)
    weights = jnp.exp(logits - lax.stop_gradient(logits.max(-1, keepdims=True)))
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    # Dividing after the product touches [q, d] numbers instead of [q, k].
    total = weights.sum(-1)
    out = jnp.einsum("bnqk,bknd->bqnd", weights.astype(v.dtype), v)
    total = jnp.swapaxes(total, 1, 2)[..., None]
    return (out.astype(jnp.float32) / jnp.maximum(total, 1e-30)).astype(v.dtype)


def _blocked(q, k, v, q_tokens, k_tokens):
    b, length, n, d = q.shape
    masked = q_tokens is not None and k_tokens is not None
    q_size, k_size = (_block(x.shape[1]) for x in (q, k))
    keys, values = _split(k, k_size), _split(v, k_size)
    k_parts = _split_tokens(k_tokens, k_size) if masked else None
    rest = jnp.arange(keys.shape[0] * k_size).reshape(-1, k_size) < k.shape[1]
    scale = d**-0.5

    @jax.checkpoint
    def queries(block):
        q, q_part = block
        q = (q.astype(jnp.float32) * scale).astype(q.dtype)

        @jax.checkpoint
        def step(carry, xs):
            top, total, acc = carry
            k, v, k_part, real = xs
            logits = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32)
            seen = real if not masked else _mask(q_part, k_part) & real
            logits = jnp.where(seen, logits, _NEVER)
            new_top = jnp.maximum(top, logits.max(-1))
            weights = jnp.where(seen, jnp.exp(logits - new_top[..., None]), 0.0)
            fade = jnp.exp(top - new_top)
            part = jnp.einsum(
                "bnqk,bknd->bnqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
            )
            return (new_top, total * fade + weights.sum(-1), acc * fade[..., None] + part), None

        rows = (b, n, q.shape[1])
        start = (jnp.full(rows, _NEVER), jnp.zeros(rows), jnp.zeros((*rows, d)))
        (_, total, acc), _ = lax.scan(step, start, (keys, values, k_parts, rest))
        out = acc / jnp.maximum(total, 1e-30)[..., None]
        return jnp.swapaxes(out, 1, 2).astype(v.dtype)

    alike = masked and q_tokens.alike
    whole = q_tokens if alike or not masked else None  # one row serves every block
    q_parts = None if whole is not None or not masked else _split_tokens(q_tokens, q_size)
    blocks = (_split(q, q_size), q_parts)
    out = lax.map(lambda x: queries((x[0], whole if x[1] is None else x[1])), blocks)
    out = jnp.moveaxis(out, 0, 1).reshape(b, -1, n, d)
    return out[:, :length]


def _block(length: int) -> int:
    """The block size that splits `length` most evenly into blocks of at most `BLOCK`."""
    return -(-length // -(-length // BLOCK))


def _split(x: Array, size: int) -> Array:
    """[b, l, ...] -> [blocks, b, size, ...], padded with zeros."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _split_tokens(tokens: Tokens, size: int) -> Tokens:
    """Columns as [blocks, b or 1, size, ...]; padding repeats nothing real and is masked apart."""
    lead = tokens.chunk.ndim - 1
    flat = jax.tree.map(lambda x: x if lead else x[None], tokens)
    return jax.tree.map(lambda x: _split(x, size), flat)
