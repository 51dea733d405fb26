"""Attention to own keys in bfloat16 and to past keys packed in NVFP4, merged by log-sum-exp.

Past keys and values are dequantized once, by the kernel of `nvfp4`, and then read by the kernel of
`op`. A kernel that unpacks tiles as it loads them repeats that for every 256 queries, with issue
slots that the softmax needs. Dequantizing 28,160 past tokens of a 5B layer moves 443 MB, 55 us at
full bandwidth; the products of 7,040 queries with them take 975 us at the full rate (modelled).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.mosaic import op
from pallas_kernels.attention.mosaic.targets import BLACKWELL
from pallas_kernels.attention.parts import merge
from pallas_kernels.nvfp4.format import BLOCK, CODE_DTYPE, NVFP4, SCALE_DTYPE
from pallas_kernels.nvfp4.mosaic.dequantize import dequantize
from pallas_kernels.tokens import VISIBILITY_COLUMNS, Tokens


def refusal(q: Array | jax.ShapeDtypeStruct, *rest: Any) -> str | None:
    """The reason why the kernels do not support these queries, or None."""
    if jnp.dtype(q.dtype) != jnp.bfloat16:
        return f"queries must be bfloat16, got {jnp.dtype(q.dtype)}"
    if q.shape[-1] not in op.WIDTHS:
        return f"the head width must be {' or '.join(map(str, op.WIDTHS))}, got {q.shape[-1]}"
    return None


def attend(
    q: Float[Array, "b q n d"],
    own_k: Float[Array, "b own n d"],
    own_v: Float[Array, "b own n d"],
    past_k: NVFP4,
    past_v: NVFP4,
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
    offset: Float[Array, "b slots #m n #d"] | None = None,
    *,
    interpret: Any = None,
) -> Float[Array, "b q n d"]:
    """Computes `attention_packed`; requires that `refusal` is None.

    `interpret` (`plgpu.InterpretGPUParams`) runs the kernels in the interpreter.
    """
    _, slots, m, _, _ = past_k.shape
    own = own_k.shape[1]
    if q_tokens is None or k_tokens is None:
        q_tokens, k_tokens = (
            op.single_chunk_tokens(q.shape[1]),
            op.single_chunk_tokens(own + slots * m),
        )
    own_tokens, past_tokens = (
        _slice_tokens(k_tokens, 0, own),
        _slice_tokens(k_tokens, own, own + slots * m),
    )
    mask = op.make_mask(q_tokens, own_tokens, target=BLACKWELL)
    parts = (
        op.attend_mask(q, own_k, own_v, mask, interpret=interpret),
        attend_packed(q, past_k, past_v, q_tokens, past_tokens, offset, interpret=interpret),
    )
    return merge(parts)


def attend_packed(
    q: Float[Array, "b q n d"],
    k: NVFP4,
    v: NVFP4,
    q_tokens: Tokens,
    k_tokens: Tokens,
    offset: Float[Array, "b slots #m n #d"] | None = None,
    *,
    interpret: Any = None,
) -> tuple[Float[Array, "b q n d"], Float[Array, "b q n"]]:
    """`attention_with_lse` for packed keys and values only."""
    keys, values = (dequantize(x, q.dtype, interpret=interpret) for x in (k, v))
    if offset is not None:
        keys = (keys.astype(jnp.float32) + offset.astype(jnp.float32)).astype(q.dtype)
    keys, values = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (keys, values))
    mask = op.make_mask(q_tokens, k_tokens, target=BLACKWELL)
    return op.attend_mask(q, keys, values, mask, interpret=interpret)


def _slice_tokens(tokens: Tokens, start: int, stop: int) -> Tokens:
    columns: list[Any] = [getattr(tokens, name)[..., start:stop] for name in VISIBILITY_COLUMNS]
    return Tokens(tokens.pos[..., start:stop, :], *columns)


def example_call(width: int = 128) -> tuple[Callable, tuple]:
    """Attention to packed keys and values only, and abstract arguments to compile it with.

    There are two heads and three slots of 640 tokens; only loop bounds depend on these sizes.
    """
    length, slots, tokens, heads = 256, 3, 640, 2
    shape = (1, slots, tokens, heads)
    struct: Any = jax.ShapeDtypeStruct
    codes, scales = (
        struct((*shape, width), CODE_DTYPE),
        struct((*shape, width // BLOCK), SCALE_DTYPE),
    )
    packed = NVFP4(codes, scales, struct((1, slots), jnp.float32), "mse")
    mean = struct((1, slots, 1, heads, width), jnp.bfloat16)
    q = struct((1, length, heads, width), jnp.bfloat16)
    pair = op.single_chunk_tokens(length), op.single_chunk_tokens(slots * tokens)
    return lambda q, k, v, mean: attend_packed(q, k, v, *pair, mean), (q, packed, packed, mean)
