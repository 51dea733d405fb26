"""Attention of chunks that see few chunks, for columns that differ between samples.

In a window of W chunks every chunk sees at most W, however long the sequence. Where each sample has
its own cuts, and so its own sinks, the chunks seen are data; this picks their keys by a product
with a one-hot matrix (exact, and its gradient is a product too) and attends densely to them alone.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.tokens import Tokens, visible


def attend_chunks(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens,
    k_tokens: Tokens,
    *,
    size: int,
    most: int,
) -> Float[Array, "b q n d"]:
    """The same as `attention` for sequences of whole chunks of `size` alike tokens.

    Exact as long as no query sees more than `most` runs of `size` keys; keys beyond that many are
    dropped, so `most` must be the true bound (the window). Float32 softmax.
    """
    b, length, heads, width = q.shape
    seen = visible(_firsts(q_tokens, size), _firsts(k_tokens, size))
    seen = jnp.broadcast_to(seen, (b, *seen.shape[-2:]))
    found, index = jax.lax.top_k(seen.astype(jnp.int32), most)  # visible runs first
    index = index.reshape(b, -1)

    def picked(x: Array) -> Array:
        runs = x.reshape(b, seen.shape[-1], size * heads * width)
        return _picked(runs, index).reshape(b, seen.shape[-2], most * size, heads, width)

    rows = q.reshape(b, seen.shape[-2], size, heads, width)
    logits = jnp.einsum("bcqnd,bcknd->bcnqk", rows, picked(k), preferred_element_type=jnp.float32)
    mask = jnp.repeat(found > 0, size, axis=-1)[:, :, None, None]
    logits = jnp.where(mask, logits * width**-0.5, -1e30)
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(logits - top), 0.0)
    weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    out = jnp.einsum("bcnqk,bcknd->bcqnd", weights.astype(v.dtype), picked(v))
    return out.reshape(b, length, heads, width)


@jax.custom_vjp
def _picked(runs: Float[Array, "b k x"], index: Int[Array, "b s"]) -> Float[Array, "b s x"]:
    """`runs[index]` in every sample, and its gradient, as products that need no transposition."""
    pick = jax.nn.one_hot(index, runs.shape[1], dtype=runs.dtype)
    return jnp.einsum("bsk,bkx->bsx", pick, runs, precision="highest")


def _picked_forward(runs, index):
    return _picked(runs, index), (index, runs.shape[1])


def _picked_backward(saved, grad):
    index, count = saved
    put = jax.nn.one_hot(index, count, axis=1, dtype=grad.dtype)
    return jnp.einsum("bks,bsx->bkx", put, grad, precision="highest"), None


_picked.defvjp(_picked_forward, _picked_backward)


def _firsts(tokens: Tokens, size: int) -> Tokens:
    """The first token of every run of `size`."""
    pos = tokens.pos[..., ::size, :]
    names = ("chunk_index", "noisy", "window_start", "sink", "global_sinks")
    return Tokens(pos, *(getattr(tokens, name)[..., ::size] for name in names))
