"""Blocked attention and its gradient in plain XLA operations.

No [queries, keys] array is ever materialized. The forward pass runs an online softmax over key
blocks for one query block at a time; the backward pass recomputes the weights of each pair of
blocks from the log-sum-exp (FlashAttention-2, arXiv:2307.08691, without the fused kernel). All
products take operands in the dtype of the arguments and accumulate in float32. Fully masked pairs
of blocks are skipped.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.saved import name_saved
from pallas_kernels.attention.tilemap import pad_tokens, tile_kinds
from pallas_kernels.tokens import Tokens, visible

MAX_BLOCK = 1280
"""Maximum queries and keys in a block. On two CPU cores, 1920 queries x 7680 keys x 4 heads of 64
take 0.07 s with this size and 0.09 s with 512 (best of six alternating runs)."""
MASKED_LOGIT = -1e30  # finite, so that a fully masked block gives no NaN
_INITIAL_MAX = -1e20  # far above it, so that the weights of such a block vanish

_not_hoisted = jax.checkpoint
"""Recompute the block masks: differentiating a loop over heads or layers would otherwise hoist the
masks of all pairs of blocks out of the loop and store them."""

einsum_f32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
"""`jnp.einsum` with float32 accumulation, whatever the operands' dtype."""


def attend_with_lse(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
    *,
    per_head: bool,
) -> tuple[Float[Array, "b q n d"], Float[Array, "b q n"]]:
    """Computes `reference.attend_with_lse` block by block; differentiable in reverse mode.

    `per_head` processes one head of one sample at a time, for CPUs, whose batched products are
    slow. Otherwise all heads run together, and a pair of blocks is skipped if it is fully masked in
    every sample.
    """
    b, length, n, d = q.shape
    q_size, k_size = (_block(x.shape[1]) for x in (q, k))
    # 1. Mark padded keys.
    is_real = None  # no padding
    if k.shape[1] % k_size:
        is_real = jnp.arange(-(-k.shape[1] // k_size) * k_size).reshape(-1, k_size) < k.shape[1]
    # 2. Split tokens and arrays into blocks, and classify the pairs of blocks.
    tokens = None
    if q_tokens is not None and k_tokens is not None:
        q_tokens, k_tokens = (_with_batch_axis(x, b) for x in (q_tokens, k_tokens))
        kinds = _block_kinds(q_tokens, k_tokens, q_size, k_size)
        tokens = _split_tokens(q_tokens, q_size), _split_tokens(k_tokens, k_size), kinds
    q, k, v = (_split(x, size) for x, size in ((q, q_size), (k, k_size), (v, k_size)))
    q, v = (jnp.swapaxes(x, -1, -2) for x in (q, v))
    # 3. Attend, and undo the split.
    run = _map_heads if per_head else _vmap_heads
    out, lse = run((q, k, v), tokens, is_real)  # [b, n, blocks, size, d], and without d
    out, lse = out.reshape(b, n, -1, d), lse.reshape(b, n, -1)
    return jnp.swapaxes(out[:, :, :length], 1, 2), jnp.swapaxes(lse[..., :length], 1, 2)


def _map_heads(heads, tokens, is_real):
    def sample(x):
        heads, tokens = x
        return lax.map(lambda head: _head(*head, tokens, is_real), heads)

    return lax.map(sample, (heads, tokens))


def _vmap_heads(heads, tokens, is_real):
    axes = None
    if tokens is not None:
        # One predicate for all samples, so that vmap keeps `cond` a branch.
        tokens, axes = (*tokens[:2], tokens[2].max(0)), (0, 0, None)
    head = jax.vmap(_head, in_axes=(0, 0, 0, None, None))
    return jax.vmap(head, in_axes=(0, 0, 0, axes, None))(*heads, tokens, is_real)


@jax.custom_vjp
def _head(q, k, v, tokens, is_real):
    """Attention of one head, in m query blocks of r rows and p key blocks of s rows.

    Logits are laid out [keys, queries]: XLA vectorises reductions over keys in that order on CPUs,
    and neither product has to transpose an operand.

    Args:
      q: query blocks [m, d, r].
      k: key blocks [p, s, d].
      v: value blocks [p, d, s].
      tokens: query tokens and key tokens of the sample, and the kinds [m, p] of `_block_kinds`.
      is_real: [p, s], False for padded keys.

    Returns:
      out: [m, r, d].
      lse: [m, r].
    """
    return _head_forward(q, k, v, tokens, is_real)[0]


def _head_forward(q, k, v, tokens, is_real):
    d, rows = q.shape[1:]
    q_tokens, k_tokens, kinds = tokens or (None, None, None)

    @_not_hoisted
    def queries(block):
        # One query block against all key blocks.
        q, q_block, kinds = block

        def step(carry, xs):
            k, v, k_block, is_real, kind = xs

            def visit(carry):
                # Online softmax: rescale the running sums to the new maximum.
                top, total, acc = carry
                logits = _logits(q, k, _block_mask(q_block, k_block, is_real))
                new_top = jnp.maximum(top, logits.max(0))
                weights = jnp.exp(logits - new_top)
                correction = jnp.exp(top - new_top)
                part = einsum_f32("dk,kq->dq", v, weights.astype(v.dtype))
                return new_top, total * correction + weights.sum(0), acc * correction + part

            return _unless_empty(kind, visit, carry), None

        start = (jnp.full(rows, _INITIAL_MAX), jnp.zeros(rows), jnp.zeros((d, rows)))
        (top, total, acc), _ = lax.scan(step, start, (k, v, k_tokens, is_real, kinds))
        return (acc / jnp.maximum(total, 1e-30)).T.astype(v.dtype), log_sum(top, total)

    results = name_saved(*lax.map(queries, (_scaled(q), q_tokens, kinds)))
    return results, (q, k, v, tokens, is_real, results)


def _head_backward(saved, gradients):
    q, k, v, tokens, is_real, (out, lse) = saved
    d_out, d_lse = gradients
    q_tokens, k_tokens, kinds = tokens or (None, None, None)
    # 1. delta: row sums of gradient times output, less the gradient of the log-sum-exp.
    has_visible = jnp.isfinite(lse)  # fully masked queries have no weights
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
    lse, delta = (jnp.where(has_visible, x, 0.0) for x in (lse, delta))
    blocks = (jnp.arange(len(q)), _scaled(q), jnp.swapaxes(d_out, 1, 2), lse, delta, q_tokens)

    # 2. One key block against all query blocks: dk and dv are complete, dq accumulates.
    @_not_hoisted
    def keys(d_q, xs):
        k, v, k_block, is_real, kinds = xs

        def step(carry, xs):
            (index, q, d_out, lse, delta, q_block), kind = xs
            d_q, d_k, d_v = carry

            def visit(sums):
                # Recompute the weights from the log-sum-exp.
                d_k, d_v, _ = sums
                weights = jnp.exp(_logits(q, k, _block_mask(q_block, k_block, is_real)) - lse)
                d_weights = einsum_f32("dk,dq->kq", v, d_out)
                d_logits = (weights * (d_weights - delta)).astype(q.dtype)
                d_k = d_k + einsum_f32("kq,dq->kd", d_logits, q)
                d_v = d_v + einsum_f32("dq,kq->dk", d_out, weights.astype(v.dtype))
                return d_k, d_v, einsum_f32("kd,kq->dq", k, d_logits)

            d_k, d_v, part = _unless_empty(kind, visit, (d_k, d_v, jnp.zeros(q.shape)))
            part = part + lax.dynamic_index_in_dim(d_q, index, keepdims=False)
            return (lax.dynamic_update_index_in_dim(d_q, part, index, 0), d_k, d_v), None

        start = (d_q, jnp.zeros(k.shape), jnp.zeros(v.shape))
        (d_q, d_k, d_v), _ = lax.scan(step, start, (blocks, kinds))
        return d_q, (d_k.astype(k.dtype), d_v.astype(v.dtype))

    by_keys = (k, v, k_tokens, is_real, None if kinds is None else kinds.T)
    d_q, (d_k, d_v) = lax.scan(keys, jnp.zeros(q.shape), by_keys)
    return (d_q * _scale(q)).astype(q.dtype), d_k, d_v, None, None


_head.defvjp(_head_forward, _head_backward)


def _scale(q: Float[Array, "*m d r"]) -> float:
    return q.shape[-2] ** -0.5


def _scaled(q: Float[Array, "*m d r"]) -> Float[Array, "*m d r"]:
    return (q.astype(jnp.float32) * _scale(q)).astype(q.dtype)


def _logits(q, k, mask) -> Float[Array, "k q"]:
    logits = einsum_f32("kd,dq->kq", k, q)
    return logits if mask is None else jnp.where(mask, logits, MASKED_LOGIT)


def _unless_empty(kind: Int[Array, ""] | None, visit: Callable[[Any], Any], carry: Any) -> Any:
    return visit(carry) if kind is None else lax.cond(kind > 0, visit, lambda x: x, carry)


def _block_mask(q_tokens, k_tokens, is_real) -> Bool[Array, "k #q"] | None:
    """The mask of a pair of blocks, without padded keys; None if nothing is masked."""
    if q_tokens is None:
        return None if is_real is None else is_real[:, None]
    mask = visible(q_tokens, k_tokens).T
    return mask if is_real is None else mask & is_real[:, None]


def log_sum(top: Float[Array, "*r"], total: Float[Array, "*r"]) -> Float[Array, "*r"]:
    """`top + log(total)`, -inf where `total` is 0, with finite gradients."""
    has_visible = total > 0
    return jnp.where(has_visible, top + jnp.log(jnp.where(has_visible, total, 1.0)), -jnp.inf)


def _block_kinds(q: Tokens, k: Tokens, q_size: int, k_size: int) -> Int[Array, "b m p"]:
    """The `tile_kinds` of all pairs of blocks: 0 if a pair is fully masked."""
    q, k = pad_tokens(q, q_size), pad_tokens(k, k_size)
    return tile_kinds(q, k, q_tile=q_size, k_tile=k_size)


def _block(length: int) -> int:
    """The block size that splits `length` most evenly into blocks of at most `MAX_BLOCK`."""
    return -(-length // -(-length // MAX_BLOCK))


def _split(x: Array, size: int) -> Array:
    """[b, l, n, d] -> [b, n, blocks, size, d], padded with zeros."""
    b, length, n, d = x.shape
    x = jnp.pad(x, [(0, 0), (0, -length % size), (0, 0), (0, 0)])
    return jnp.swapaxes(x, 1, 2).reshape(b, n, -1, size, d)


def _with_batch_axis(tokens: Tokens, batch: int) -> Tokens:
    """Tokens broadcast to a batch axis."""
    own = tokens.chunk_index.ndim
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[own - 1 :])), tokens)


def _split_tokens(tokens: Tokens, size: int) -> Tokens:
    """Columns [b, l, ...] as [b, blocks, size, ...]; [b, blocks, 1, ...] for a uniform mask.

    Padding is masked separately (`is_real`).
    """

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
        return (
            jnp.broadcast_to(x[:, :1, :1], (*x.shape[:2], 1, *x.shape[3:])) if uniform_mask else x
        )

    uniform_mask = tokens.uniform_mask
    return jax.tree.map(split, tokens)
