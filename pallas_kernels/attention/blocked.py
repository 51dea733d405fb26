"""Attention block by block in plain XLA operations, and its gradient likewise.

Neither ever holds a [queries, keys] array: an online softmax runs over blocks of keys for one block
of queries at a time, and the gradient makes the weights of a pair of blocks anew from the
log-sum-exp (FlashAttention-2, arXiv:2307.08691, without the fused kernel). Products, those of the
gradient included, take operands of the arguments' dtype and give float32; what is summed over
blocks stays float32. A pair of blocks in which no query sees a key is skipped.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.tilemap import pad_tokens, tile_kinds
from pallas_kernels.tokens import Tokens, visible

BLOCK = 1280
"""Most queries and keys in a block. On two CPU cores 1920 queries x 7680 keys x 4 heads of 64 take
0.07 s with such blocks and 0.09 s with blocks of 512 (the least of six, in turn)."""
NEVER = -1e30  # finite, so that a block without visible keys gives no NaN
_LOWEST = -1e20  # far above it, so that the weights of such a block vanish too

_not_hoisted = jax.checkpoint
"""Else a loop over heads or layers, once differentiated, takes out of itself what is the same every
time: the masks of all pairs of blocks."""

product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
"""Sums in float32, whatever it multiplies."""


def attend_with_lse(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
    *,
    one_by_one: bool,
) -> tuple[Float[Array, "b q n d"], Float[Array, "b q n"]]:
    """As `reference.attend_with_lse`; differentiable in reverse.

    `one_by_one`: one head of one sample after the other, for CPUs, whose batched products are slow.
    Else all at once, and a pair of blocks is skipped if no sample needs it.
    """
    b, length, n, d = q.shape
    q_size, k_size = (_block(x.shape[1]) for x in (q, k))
    real = None  # nothing is padded
    if k.shape[1] % k_size:
        real = jnp.arange(-(-k.shape[1] // k_size) * k_size).reshape(-1, k_size) < k.shape[1]
    tokens = None
    if q_tokens is not None and k_tokens is not None:
        q_tokens, k_tokens = (_wide(x, b) for x in (q_tokens, k_tokens))
        kinds = _kinds(q_tokens, k_tokens, q_size, k_size)
        tokens = _split_tokens(q_tokens, q_size), _split_tokens(k_tokens, k_size), kinds
    q, k, v = (_split(x, size) for x, size in ((q, q_size), (k, k_size), (v, k_size)))
    q, v = (jnp.swapaxes(x, -1, -2) for x in (q, v))
    run = _one_by_one if one_by_one else _at_once
    out, lse = run((q, k, v), tokens, real)  # [b, n, blocks, size, d], and without d
    out, lse = out.reshape(b, n, -1, d), lse.reshape(b, n, -1)
    return jnp.swapaxes(out[:, :, :length], 1, 2), jnp.swapaxes(lse[..., :length], 1, 2)


def _one_by_one(heads, tokens, real):
    def sample(x):
        heads, tokens = x
        return lax.map(lambda head: _head(*head, tokens, real), heads)

    return lax.map(sample, (heads, tokens))


def _at_once(heads, tokens, real):
    axes = None
    if tokens is not None:
        # One answer for all samples, so that the condition stays one when it is mapped.
        tokens, axes = (*tokens[:2], tokens[2].max(0)), (0, 0, None)
    head = jax.vmap(_head, in_axes=(0, 0, 0, None, None))
    return jax.vmap(head, in_axes=(0, 0, 0, axes, None))(*heads, tokens, real)


@jax.custom_vjp
def _head(q, k, v, tokens, real):
    """Output [m, r, d] and log-sum-exp [m, r] of one head, in blocks: q [m, d, r], k [p, s, d], v
    [p, d, s]. `tokens` are those of the sample and the kinds [m, p] of `_kinds`; `real` [p, s] is
    False for padded keys.

    Logits are [keys, queries], for which XLA's reductions over keys are vectorised on CPUs; and
    neither product has to transpose an operand.
    """
    return _head_forward(q, k, v, tokens, real)[0]


def _head_forward(q, k, v, tokens, real):
    d, rows = q.shape[1:]
    q_tokens, k_tokens, kinds = tokens or (None, None, None)

    @_not_hoisted
    def queries(block):
        q, q_part, kinds = block

        def step(carry, xs):
            k, v, k_part, real, kind = xs

            def visit(carry):
                top, total, acc = carry
                logits = _logits(q, k, _seen(q_part, k_part, real))
                new_top = jnp.maximum(top, logits.max(0))
                weights = jnp.exp(logits - new_top)
                fade = jnp.exp(top - new_top)
                part = product("dk,kq->dq", v, weights.astype(v.dtype))
                return new_top, total * fade + weights.sum(0), acc * fade + part

            return _unless_empty(kind, visit, carry), None

        start = (jnp.full(rows, _LOWEST), jnp.zeros(rows), jnp.zeros((d, rows)))
        (top, total, acc), _ = lax.scan(step, start, (k, v, k_tokens, real, kinds))
        return (acc / jnp.maximum(total, 1e-30)).T.astype(v.dtype), log_sum(top, total)

    found = lax.map(queries, (_scaled(q), q_tokens, kinds))
    return found, (q, k, v, tokens, real, found)


def _head_backward(saved, gradients):
    q, k, v, tokens, real, (out, lse) = saved
    d_out, d_lse = gradients
    q_tokens, k_tokens, kinds = tokens or (None, None, None)
    some = jnp.isfinite(lse)  # a query that sees nothing has no weights either
    mean = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
    lse, mean = (jnp.where(some, x, 0.0) for x in (lse, mean))
    blocks = (jnp.arange(len(q)), _scaled(q), jnp.swapaxes(d_out, 1, 2), lse, mean, q_tokens)

    @_not_hoisted
    def keys(d_q, xs):
        k, v, k_part, real, kinds = xs

        def step(carry, xs):
            (at, q, d_out, lse, mean, q_part), kind = xs
            d_q, d_k, d_v = carry

            def visit(sums):
                d_k, d_v, _ = sums
                weights = jnp.exp(_logits(q, k, _seen(q_part, k_part, real)) - lse)
                d_weights = product("dk,dq->kq", v, d_out)
                d_logits = (weights * (d_weights - mean)).astype(q.dtype)
                d_k = d_k + product("kq,dq->kd", d_logits, q)
                d_v = d_v + product("dq,kq->dk", d_out, weights.astype(v.dtype))
                return d_k, d_v, product("kd,kq->dq", k, d_logits)

            d_k, d_v, part = _unless_empty(kind, visit, (d_k, d_v, jnp.zeros(q.shape)))
            part = part + lax.dynamic_index_in_dim(d_q, at, keepdims=False)
            return (lax.dynamic_update_index_in_dim(d_q, part, at, 0), d_k, d_v), None

        start = (d_q, jnp.zeros(k.shape), jnp.zeros(v.shape))
        (d_q, d_k, d_v), _ = lax.scan(step, start, (blocks, kinds))
        return d_q, (d_k.astype(k.dtype), d_v.astype(v.dtype))

    by_keys = (k, v, k_tokens, real, None if kinds is None else kinds.T)
    d_q, (d_k, d_v) = lax.scan(keys, jnp.zeros(q.shape), by_keys)
    return (d_q * _scale(q)).astype(q.dtype), d_k, d_v, None, None


_head.defvjp(_head_forward, _head_backward)


def _scale(q: Float[Array, "*m d r"]) -> float:
    return q.shape[-2] ** -0.5


def _scaled(q: Float[Array, "*m d r"]) -> Float[Array, "*m d r"]:
    return (q.astype(jnp.float32) * _scale(q)).astype(q.dtype)


def _logits(q, k, seen) -> Float[Array, "k q"]:
    logits = product("kd,dq->kq", k, q)
    return logits if seen is None else jnp.where(seen, logits, NEVER)


def _unless_empty(kind: Int[Array, ""] | None, visit: Callable[[Any], Any], carry: Any) -> Any:
    return visit(carry) if kind is None else lax.cond(kind > 0, visit, lambda x: x, carry)


def _seen(q_tokens, k_tokens, real) -> Bool[Array, "k #q"] | None:
    """Which keys of a block are there and visible; None if all."""
    if q_tokens is None:
        return None if real is None else real[:, None]
    seen = visible(q_tokens, k_tokens).T
    return seen if real is None else seen & real[:, None]


def log_sum(top: Float[Array, "*r"], total: Float[Array, "*r"]) -> Float[Array, "*r"]:
    """`top + log(total)`, -inf where `total` is 0, with finite gradients."""
    some = total > 0
    return jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)


def _kinds(q: Tokens, k: Tokens, q_size: int, k_size: int) -> Int[Array, "b m p"]:
    """Of every block of queries and of keys: 0 if no query sees a key."""
    q, k = pad_tokens(q, q_size), pad_tokens(k, k_size)
    return tile_kinds(q, k, q_tile=q_size, k_tile=k_size)


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
    own = tokens.chunk_index.ndim
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[own - 1 :])), tokens)


def _split_tokens(tokens: Tokens, size: int) -> Tokens:
    """Columns [b, l, ...] as [b, blocks, size, ...], or [b, blocks, 1, ...] of tokens that see
    alike; padded keys are masked apart."""

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
        return (
            jnp.broadcast_to(x[:, :1, :1], (*x.shape[:2], 1, *x.shape[3:])) if uniform_mask else x
        )

    uniform_mask = tokens.uniform_mask
    return jax.tree.map(split, tokens)
