"""Attention in plain XLA operations: dense where that is small, else block by block.

The blocked form never holds a [queries, keys] array: an online softmax runs over blocks of keys
for one block of queries at a time, and both loops are rematerialised, so that its gradient needs
no more memory than its value (FlashAttention, arXiv:2205.14135, without the fused kernel).

A loop sums the cotangent of an array that it only reads in the dtype of that array. So keys and
values enter the loops in float32 too, but for their gradients alone, and queries the inner one.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.dispatch import platform
from pallas_kernels.tokens import Tokens, visible, visible_keys

DENSE_BYTES = 1 << 26
"""Logits larger than this are done in blocks."""
BLOCK = 1280
"""Most queries and keys in a block. On two CPU cores 1920 queries x 7680 keys x 4 heads took 0.19 s
with such blocks and 0.21 s with blocks of 512."""
_NEVER = -1e30  # finite, so that a block without visible keys gives no NaN
_LOWEST = -1e20  # far above it, so that the weights of such a block vanish too


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
    """`attend`, and what `reference.attend_with_lse` gives beside it."""
    if platform() == "cpu" and v.dtype != jnp.float32:
        q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
        out, lse = attend_with_lse(q32, k32, v32, q_tokens, k_tokens, dense_bytes=dense_bytes)
        return out.astype(v.dtype), lse
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
    top = lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - top)
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    # Dividing after the product touches [q, d] numbers instead of [q, k].
    total = weights.sum(-1)
    out = jnp.einsum("bnqk,bknd->bqnd", weights.astype(v.dtype), v)
    total, top = (jnp.swapaxes(x, 1, 2) for x in (total, top[..., 0]))
    out = (out.astype(jnp.float32) / jnp.maximum(total[..., None], 1e-30)).astype(v.dtype)
    return out, log_sum(top, total)


def _blocked(q, k, v, q_tokens, k_tokens):
    """One head of one sample after the other on CPUs, whose batched products are slow; elsewhere
    all at once."""
    b, length, n, d = q.shape
    masked = q_tokens is not None and k_tokens is not None
    q_size, k_size = (_block(x.shape[1]) for x in (q, k))
    real = None  # nothing is padded
    if k.shape[1] % k_size:
        real = jnp.arange(-(-k.shape[1] // k_size) * k_size).reshape(-1, k_size) < k.shape[1]
    each = lax.map if platform() == "cpu" else _at_once

    def sample(x):
        *heads, q_part, k_part = x
        return each(lambda x: _head(x, q_part, k_part, real), tuple(heads))

    q_parts = k_parts = None
    if masked:
        q_parts, k_parts = _wide(q_tokens, b), _split_tokens(_wide(k_tokens, b), k_size)
        if not q_tokens.alike:  # else one row serves every block of queries
            q_parts = _split_tokens(q_parts, q_size)
    q, k, v = (_split(x, size) for x, size in ((q, q_size), (k, k_size), (v, k_size)))
    q, v = (jnp.swapaxes(x, -1, -2) for x in (q, v))
    k, v = ((x, x.astype(jnp.float32)) for x in (k, v))
    out, lse = each(sample, (q, k, v, q_parts, k_parts))  # [b, n, blocks, size, d], less d
    out, lse = out.reshape(b, n, -1, d), lse.reshape(b, n, -1)
    return jnp.swapaxes(out[:, :, :length], 1, 2), jnp.swapaxes(lse[..., :length], 1, 2)


def _at_once(function, xs):
    return jax.vmap(function)(xs)


@jax.custom_jvp
def _narrow(x: Array, wide: Array) -> Array:
    """`x`, whose gradient goes to the same numbers in float32; their values are never read."""
    del wide
    return x


@_narrow.defjvp
def _narrow_jvp(primals, tangents):
    return primals[0], tangents[1].astype(primals[0].dtype)


def _head(head, q_tokens, k_tokens, real):
    """One head: k [blocks, size, d], q and v [blocks, d, size]; tokens are those of its sample.

    Logits are [keys, queries], for which XLA's reductions over keys are vectorised on CPUs; and
    neither product has to transpose an operand. k and v are pairs for `_narrow`.
    """
    q, k, v = head
    dtype, scale = q.dtype, q.shape[-2] ** -0.5

    @jax.checkpoint
    def queries(block):
        q, q_part = block
        q = q.astype(jnp.float32) * scale

        @jax.checkpoint
        def step(carry, xs):
            top, total, acc = carry
            k, v, k_part, real = xs
            k, v = _narrow(*k), _narrow(*v)
            logits = jnp.einsum("kd,dq->kq", k, q.astype(dtype), preferred_element_type=jnp.float32)
            seen = _seen(q_part, k_part, real)
            if seen is not None:
                logits = jnp.where(seen, logits, _NEVER)
            new_top = lax.stop_gradient(jnp.maximum(top, logits.max(0)))  # cancels in the result
            weights = jnp.exp(logits - new_top)
            fade = jnp.exp(top - new_top)
            part = jnp.einsum(
                "dk,kq->dq", v, weights.astype(dtype), preferred_element_type=jnp.float32
            )
            return (new_top, total * fade + weights.sum(0), acc * fade + part), None

        d, rows = q.shape
        start = (jnp.full(rows, _LOWEST), jnp.zeros(rows), jnp.zeros((d, rows)))
        (top, total, acc), _ = lax.scan(step, start, (k, v, k_tokens, real))
        return (acc / jnp.maximum(total, 1e-30)).T.astype(dtype), log_sum(top, total)

    if q_tokens is None or q_tokens.alike:
        return lax.map(lambda q: queries((q, q_tokens)), q)
    return lax.map(queries, (q, q_tokens))


def log_sum(top: Float[Array, "*r"], total: Float[Array, "*r"]) -> Float[Array, "*r"]:
    """`top + log(total)`, -inf where `total` is 0, with finite gradients."""
    some = total > 0
    return jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)


def _seen(q_tokens, k_tokens, real) -> Bool[Array, "k #q"] | None:
    """Which keys of a block are there and visible; None if all."""
    if q_tokens is None:
        return None if real is None else real[:, None]
    if q_tokens.alike:
        seen = visible_keys(q_tokens, k_tokens)[:, None]
    else:
        seen = visible(q_tokens, k_tokens).T
    return seen if real is None else seen & real[:, None]


def _block(length: int) -> int:
    """The block size that splits `length` most evenly into blocks of at most `BLOCK`."""
    return -(-length // -(-length // BLOCK))


def _split(x: Array, size: int) -> Array:
    """[b, l, n, d] -> [b, n, blocks, size, d], padded with zeros."""
    b, length, n, d = x.shape
    x = jnp.pad(x, [(0, 0), (0, -length % size), (0, 0), (0, 0)])
    return jnp.swapaxes(x, 1, 2).reshape(b, n, -1, size, d)


def _wide(tokens: Tokens, batch: int) -> Tokens:
    """Tokens with a batch axis."""
    own = tokens.chunk.ndim
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[own - 1 :])), tokens)


def _split_tokens(tokens: Tokens, size: int) -> Tokens:
    """Columns [b, l, ...] as [b, blocks, size, ...]; padded keys are masked apart."""

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, size, *x.shape[2:])

    return jax.tree.map(split, tokens)
