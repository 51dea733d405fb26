"""Attention to keys and values of which the past is packed in NVFP4 and the current chunk is not.

An `offset` is what was subtracted from the keys before they were packed: one number a key and head
(`[b, slots, m, n, 1]`) or one a channel for a whole slot (`[b, slots, 1, n, d]`). It is always
restored, so the result is attention to the keys as they were, but for rounding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention import reference
from pallas_kernels.attention.api import attention, check, which
from pallas_kernels.dispatch import Implementation, Unsupported, capability, platform
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
    """`attention` to own keys and, after them, those of `past_k` and `past_v` `[b, slots, m, n, d]`
    with an `amax` for each sample and slot.

    "mosaic" (Blackwell) reads what is packed; all others unpack it to the dtype of `own_v` and are
    `attention` of that name, "auto" among them; "reference" unpacks to float32. Raises ValueError
    for tokens that do not fit and `Unsupported` where a named implementation cannot run.
    """
    chosen = which_packed(q, past_k, offset, q_tokens, implementation=implementation)
    if chosen == "mosaic":
        from pallas_kernels.attention.mosaic import packed_op

        length = own_k.shape[1] + past_k.shape[1] * past_k.shape[2]
        check(q, jax.ShapeDtypeStruct((q.shape[0], length), q.dtype), q_tokens, k_tokens)
        return packed_op.attend(q, own_k, own_v, past_k, past_v, q_tokens, k_tokens, offset)
    dtypes = (jnp.float32,) * 2 if chosen == "reference" else (own_k.dtype, own_v.dtype)
    past = unpacked(past_k, offset, dtypes[0]), unpacked(past_v, None, dtypes[1])
    own = (x.astype(dtype) for x, dtype in zip((own_k, own_v), dtypes, strict=True))
    k, v = (jnp.concatenate(pair, axis=1) for pair in zip(own, past, strict=True))
    if chosen == "reference":
        check(q, k, q_tokens, k_tokens)
        return reference.attend(q, k, v, q_tokens, k_tokens).astype(own_v.dtype)
    return attention(q, k, v, q_tokens, k_tokens, implementation=chosen)


def unpacked(
    past: NVFP4, offset: Float[Array, "b slots #m n #d"] | None, dtype: jnp.dtype
) -> Float[Array, "b k n d"]:
    """Keys or values of all slots, one after the other, rounded once from float32."""
    if offset is None:
        x = dequantize(past, dtype)
    else:
        x = (dequantize(past, jnp.float32) + offset.astype(jnp.float32)).astype(dtype)
    b, _, _, n, d = x.shape
    return x.reshape(b, -1, n, d)


def which_packed(
    q: Array | jax.ShapeDtypeStruct,
    past_k: NVFP4,
    offset: Array | jax.ShapeDtypeStruct | None = None,
    q_tokens: Tokens | None = None,
    *,
    implementation: Implementation = "auto",
) -> Implementation:
    """The implementation that `attention_packed` uses for these arguments, by name.

    "auto" never is "mosaic", which has not run on a GPU yet.
    """
    if implementation != "mosaic":
        return which(q, q, q, q_tokens, q_tokens, implementation=implementation)
    if not capability().startswith("10."):
        found = f"sm_{capability().replace('.', '')}" if platform() == "gpu" else platform()
        raise Unsupported(
            f"attention to NVFP4 keys needs Blackwell (sm_100); this is {found}: use "
            "implementation='auto' (dequantizes)"
        )
    from pallas_kernels.attention.mosaic import packed_op

    if why := packed_op.refusal(q, past_k, offset):
        raise Unsupported(f"attention to NVFP4 keys: {why}; use implementation='auto'")
    return implementation
