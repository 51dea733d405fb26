"""cuDNN's fused attention, for a mask of one row per sample: cached sampling, cross-attention.

cuDNN masks cheaply only by the number of leading keys. In cached sampling the chunk's own keys come
first and cache slots are filled in order, so the visible keys normally are the leading ones. This
is checked at run time; otherwise the blocked implementation runs.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.attention import xla
from pallas_kernels.attention.segments import Segment
from pallas_kernels.dispatch import platform
from pallas_kernels.tokens import Tokens, visible_keys


def refusal(
    q: Array | jax.ShapeDtypeStruct, q_tokens: Tokens | None, segment_list: list[Segment] | None
) -> str | None:
    """The reason why cuDNN cannot run these arguments, or None."""
    if platform() not in ("gpu", "cuda"):
        return "needs a CUDA device"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs 16-bit arguments, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"needs heads of a multiple of 8 up to 128, not {q.shape[-1]}"
    if q_tokens is not None and segment_list is None and not q_tokens.uniform_mask:
        return "needs one mask row per sample; queries differ in their masks"
    return None


def attend(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
) -> Float[Array, "b q n d"]:
    """Computes `reference.attend`; requires that `refusal` is None."""
    if q_tokens is None or k_tokens is None:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    mask = visible_keys(q_tokens, k_tokens)
    mask = jnp.broadcast_to(mask, (q.shape[0], k.shape[1]))
    counts = mask.sum(-1, dtype=jnp.int32)
    leading = jnp.all(mask == (jnp.arange(k.shape[1]) < counts[:, None])) & jnp.all(counts > 0)

    def fused(q, k, v):
        rows = jnp.full(q.shape[:1], q.shape[1], jnp.int32)
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            query_seq_lengths=rows,
            key_value_seq_lengths=counts,
            implementation="cudnn",
        )

    def blocked(q, k, v):
        return xla.attend(q, k, v, q_tokens, k_tokens)

    return lax.cond(leading, fused, blocked, q, k, v)
