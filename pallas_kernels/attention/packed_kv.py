"""Attention to the current chunk's keys and values and to past ones packed in NVFP4.

An `offset` was subtracted from the keys before packing: one value per key and head
(`[b, slots, m, n, 1]`) or one per channel and slot (`[b, slots, 1, n, d]`). It is always added
back, so the result is attention to the original keys up to rounding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention import reference
from pallas_kernels.attention.api import attention, check_tokens, select_implementation
from pallas_kernels.catalog import kernels_of
from pallas_kernels.dispatch import (
    Implementation,
    Unsupported,
    capability,
    kernel_refusal,
    launch_of,
    platform,
    proven,
)
from pallas_kernels.nvfp4 import NVFP4, dequantize
from pallas_kernels.tokens import Tokens


def attention_packed(
    q: Float[Array, "b q n d"],
    own_k: Float[Array, "b own n d"],
    own_v: Float[Array, "b own n d"],
    past_k: NVFP4,
    past_v: NVFP4,
    q_tokens: Tokens | None = None,
    k_tokens: Tokens | None = None,
    *,
    offset: Float[Array, "b slots #m n #d"] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "b q n d"]:
    """`attention` to the chunk's own keys and then to the packed past keys.

    "reference" dequantizes to float32; the others to the dtype of the own keys and values. "mosaic"
    (Blackwell) attends to own and past keys separately and merges the results.

    Args:
      q: queries.
      own_k, own_v: keys and values of the current chunk.
      past_k, past_v: packed [b, slots, m, n, d], with one `amax` per sample and slot.
      q_tokens: query tokens, or None if nothing is masked.
      k_tokens: tokens of the own keys, then of the past keys.
      offset: what was subtracted from the keys before packing, or None.
      implementation: name of an implementation, or "auto".

    Raises ValueError for tokens that do not match, `Unsupported` if an implementation cannot run.
    """
    chosen = select_packed_implementation(
        q, past_k, offset, q_tokens, implementation=implementation
    )
    if chosen == "mosaic":
        length = own_k.shape[1] + past_k.shape[1] * past_k.shape[2]
        check_tokens(q, jax.ShapeDtypeStruct((q.shape[0], length), q.dtype), q_tokens, k_tokens)
        return launch_of("attention_packed")(
            q, own_k, own_v, past_k, past_v, q_tokens, k_tokens, offset
        )
    dtypes = (jnp.float32,) * 2 if chosen == "reference" else (own_k.dtype, own_v.dtype)
    past = dequantize_kv(past_k, offset, dtypes[0]), dequantize_kv(past_v, None, dtypes[1])
    own = (x.astype(dtype) for x, dtype in zip((own_k, own_v), dtypes, strict=True))
    k, v = (jnp.concatenate(pair, axis=1) for pair in zip(own, past, strict=True))
    if chosen == "reference":
        check_tokens(q, k, q_tokens, k_tokens)
        return reference.attend(q, k, v, q_tokens, k_tokens).astype(own_v.dtype)
    return attention(q, k, v, q_tokens, k_tokens, implementation=chosen)


def dequantize_kv(
    past: NVFP4, offset: Float[Array, "b slots #m n #d"] | None, dtype: jnp.dtype
) -> Float[Array, "b k n d"]:
    """Dequantized keys or values of all slots in order, plus the offset, rounded once."""
    x = dequantize(past, dtype, offset=offset)
    b, _, _, n, d = x.shape
    return x.reshape(b, -1, n, d)


def select_packed_implementation(
    q: Array | jax.ShapeDtypeStruct,
    past_k: NVFP4,
    offset: Array | jax.ShapeDtypeStruct | None = None,
    q_tokens: Tokens | None = None,
    *,
    implementation: Implementation = "auto",
) -> Implementation:
    """The name of the implementation that `attention_packed` uses for these arguments.

    "auto" selects "mosaic" only where its kernel is proven (`dispatch.proven`). Raises
    `Unsupported` if the named implementation cannot run.
    """
    if implementation == "auto" and proven("attention_packed", q, past_k, offset):
        return "mosaic"
    if implementation != "mosaic":
        return select_implementation(q, q, q, q_tokens, q_tokens, implementation=implementation)
    if not kernels_of("attention_packed", capability()):
        chip = f"sm_{capability().replace('.', '')}" if platform() == "gpu" else platform()
        raise Unsupported(
            f"attention to NVFP4 keys needs Blackwell (sm_100); this is {chip}: use "
            "implementation='auto' (dequantizes)"
        )
    if why := kernel_refusal("attention_packed", capability(), q, past_k, offset):
        raise Unsupported(f"attention to NVFP4 keys: {why}; use implementation='auto'")
    return implementation
