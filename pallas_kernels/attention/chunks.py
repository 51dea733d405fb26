"""Windowed attention by chunks, for masks that differ between samples.

In a window of W chunks, every chunk attends to at most W chunks, however long the sequence. If
samples have different cuts and so different sinks, the visible chunks are data. `attend_chunks`
gathers their keys with a one-hot matrix product (exact, and its gradient is a product as well) and
attends densely to those only.
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
    """`attention` for sequences of chunks of `size` tokens that share their mask columns.

    The softmax is in float32. Exact if no query attends to more than `most` chunks of keys; further
    chunks are dropped, so `most` must be the true bound (the window length).
    """
    b, length, heads, width = q.shape
    # 1. The indices of the visible chunks of each chunk.
    visible_chunks = visible(_firsts(q_tokens, size), _firsts(k_tokens, size))
    visible_chunks = jnp.broadcast_to(visible_chunks, (b, *visible_chunks.shape[-2:]))
    is_visible, index = jax.lax.top_k(visible_chunks.astype(jnp.int32), most)  # visible runs first
    index = index.reshape(b, -1)

    def picked(x: Array) -> Array:
        runs = x.reshape(b, visible_chunks.shape[-1], size * heads * width)
        return _picked(runs, index).reshape(b, visible_chunks.shape[-2], most * size, heads, width)

    # 2. Masked softmax over the gathered keys.
    rows = q.reshape(b, visible_chunks.shape[-2], size, heads, width)
    logits = jnp.einsum("bcqnd,bcknd->bcnqk", rows, picked(k), preferred_element_type=jnp.float32)
    mask = jnp.repeat(is_visible > 0, size, axis=-1)[:, :, None, None]
    logits = jnp.where(mask, logits * width**-0.5, -1e30)
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(logits - top), 0.0)
    weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    out = jnp.einsum("bcnqk,bcknd->bcqnd", weights.astype(v.dtype), picked(v))
    return out.reshape(b, length, heads, width)


@jax.custom_vjp
def _picked(runs: Float[Array, "b k x"], index: Int[Array, "b s"]) -> Float[Array, "b s x"]:
    """`runs[index]` of every sample; gather and gradient are one-hot products."""
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
    """The first token of every chunk of `size` tokens."""
    pos = tokens.pos[..., ::size, :]
    names = ("chunk_index", "noisy", "window_start", "sink", "global_sinks")
    return Tokens(pos, *(getattr(tokens, name)[..., ::size] for name in names))
