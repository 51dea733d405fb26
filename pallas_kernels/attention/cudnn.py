"""cuDNN's fused attention, without a mask or with one that is a number of leading keys per sample.

Masks that split into `segments` need no mask at all. In cached sampling the mask is one row per
sample, and slots are filled in order, so that the visible keys are the leading ones
(`Tokens.leading`). Other masks are refused; nothing is decided on the device.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import cudnn_call
from pallas_kernels.attention.segments import Segment
from pallas_kernels.dispatch import capability, platform
from pallas_kernels.tokens import Tokens, is_static, visible_keys

LEAST_CAPABILITY = (8, 0)
"""Oldest GPUs with cuDNN's flash attention (Ampere)."""


def refusal(
    q: Array | jax.ShapeDtypeStruct,
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
    segment_list: list[Segment] | None,
) -> str | None:
    """The reason why cuDNN cannot run these arguments, or None."""
    if platform() not in ("gpu", "cuda"):
        return "needs a CUDA device"
    version = tuple(int(x) for x in capability().split(".") if x)
    if version and version < LEAST_CAPABILITY:
        return f"needs compute capability 8.0, the device has {capability()}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs 16-bit arguments, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"needs heads of a multiple of 8 up to 128, not {q.shape[-1]}"
    if q_tokens is None or k_tokens is None or segment_list is not None:
        return None
    if not q_tokens.uniform_mask:
        return "needs one mask row per sample; queries differ in their masks"
    if not _is_leading(q_tokens, k_tokens):
        return "needs the visible keys first; these are not known to come in that order"
    return None


def _is_leading(q_tokens: Tokens, k_tokens: Tokens) -> bool:
    """Whether visible keys precede masked ones: by construction, or seen in static columns."""
    if k_tokens.leading or not is_static(q_tokens, k_tokens):
        return k_tokens.leading
    mask = np.atleast_2d(np.asarray(visible_keys(q_tokens, k_tokens)))
    return not (mask[:, 1:] & ~mask[:, :-1]).any()


def attend(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
) -> Float[Array, "b q n d"]:
    """Computes `reference.attend`; requires that `refusal` is None."""
    if q_tokens is None or k_tokens is None:
        return _attend(q, k, v, None)
    counts = _num_visible(q, q_tokens, k_tokens)
    out = _attend(q, k, v, jnp.maximum(counts, 1))
    return jnp.where(counts[:, None, None, None] > 0, out, 0)


def attend_with_lse(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
) -> tuple[Float[Array, "b q n d"], Float[Array, "b q n"]]:
    """Computes `reference.attend_with_lse`; requires that `refusal` is None.

    A gradient of the log-sum-exp costs one more forward and one more backward call.
    """
    if q_tokens is None or k_tokens is None:
        out, lse = _attend_with_lse(q, k, v, None)
        return out, jnp.swapaxes(lse, 1, 2)
    counts = _num_visible(q, q_tokens, k_tokens)
    out, lse = _attend_with_lse(q, k, v, jnp.maximum(counts, 1))
    any_visible = counts[:, None, None] > 0
    lse = jnp.where(any_visible, jnp.swapaxes(lse, 1, 2), -jnp.inf)
    return jnp.where(any_visible[..., None], out, 0), lse


def _num_visible(q: Array, q_tokens: Tokens, k_tokens: Tokens) -> Int[Array, "b"]:
    mask = visible_keys(q_tokens, k_tokens)
    counts = jnp.atleast_1d(jnp.asarray(mask).sum(-1, dtype=jnp.int32))
    return jnp.broadcast_to(counts, q.shape[:1])


@jax.custom_vjp
def _attend(q, k, v, lengths):
    return cudnn_call.forward_only(q, k, v, lengths)


def _attend_forward(q, k, v, lengths):
    out, lse = cudnn_call.forward(q, k, v, lengths)
    return out, (q, k, v, out, lse, lengths)


def _attend_backward(saved, d_out):
    q, k, v, out, lse, lengths = saved
    return (*cudnn_call.backward(q, k, v, out, lse, d_out, lengths), None)


_attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_vjp
def _attend_with_lse(q, k, v, lengths):
    """`cudnn_call.forward`, whose log-sum-exp is [b, n, q]."""
    return cudnn_call.forward(q, k, v, lengths)


def _with_lse_forward(*operands):
    q, k, v = (x.value for x in operands[:3])
    lengths = None if operands[3] is None else operands[3].value
    out, lse = cudnn_call.forward(q, k, v, lengths)
    return (out, lse), (q, k, v, out, lse, lengths)


def _with_lse_backward(saved, gradients):
    q, k, v, out, lse, lengths = saved
    d_out, d_lse = gradients
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros_like(out)
    d_q, d_k, d_v = cudnn_call.backward(q, k, v, out, lse, d_out, lengths)
    if isinstance(d_lse, SymbolicZero):
        return d_q, d_k, d_v, None
    # d lse / d logits are the weights: d_q gains weights @ k, and d_k gains weights^T @ q.
    share = (jnp.swapaxes(d_lse, 1, 2) * q.shape[-1] ** -0.5)[..., None]
    share = jnp.where(jnp.isfinite(share), share, 0.0)
    mean = cudnn_call.forward_only(q, k, k, lengths).astype(jnp.float32)
    weighted = (share * q.astype(jnp.float32)).astype(q.dtype)
    added = cudnn_call.backward(q, k, v, out, lse, weighted, lengths)[2]
    d_q = (d_q.astype(jnp.float32) + share * mean).astype(q.dtype)
    return d_q, d_k + added, d_v, None


_attend_with_lse.defvjp(_with_lse_forward, _with_lse_backward, symbolic_zeros=True)
