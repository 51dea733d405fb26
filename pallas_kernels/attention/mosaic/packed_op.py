"""Attention to own keys in bfloat16 and to packed past keys: two kernels, merged by log-sum-exp.

The current chunk's keys go through the kernel of `op`, the past keys through `packed_forward`. The
merge is in float32. A single kernel with two kinds of tiles would save one pass over the output
(43 MB per layer of the 5B model, about 10 us of a millisecond), but would need a second loading
path and lose the tested kernel of `op`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.mosaic import op
from pallas_kernels.attention.mosaic.columns import MaskColumns, mask_columns
from pallas_kernels.attention.mosaic.packed_forward import PackedKeysValues, PackedTiles, forward
from pallas_kernels.attention.mosaic.primitives import LOG2_E, MASKED
from pallas_kernels.attention.mosaic.targets import BLACKWELL
from pallas_kernels.attention.tilemap import (
    TileMap,
    concrete_evaluation,
    is_concrete,
    pad_tokens,
    tile_map,
)
from pallas_kernels.nvfp4.format import BLOCK, CODE_DTYPE, NVFP4, SCALE_DTYPE, amax_divisor
from pallas_kernels.tokens import VISIBILITY_COLUMNS, Tokens

TILES = PackedTiles()


def refusal(
    q: Array | jax.ShapeDtypeStruct, past: NVFP4, offset: Array | jax.ShapeDtypeStruct | None
) -> str | None:
    """The reason why the kernel does not support these arguments, or None."""
    if jnp.dtype(q.dtype) != jnp.bfloat16:
        return f"queries must be bfloat16, got {jnp.dtype(q.dtype)}"
    if q.shape[-1] not in op.WIDTHS:
        return f"the head width must be {' or '.join(map(str, op.WIDTHS))}, got {q.shape[-1]}"
    if past.shape[-3] % TILES.keys:
        return f"tokens per slot must be a multiple of {TILES.keys}, got {past.shape[-3]}"
    if offset is not None and offset.shape[-3] != 1:
        return "it restores one mean per channel, not one per token"
    return None


def attend(
    q: Float[Array, "b q n d"],
    own_k: Float[Array, "b own n d"],
    own_v: Float[Array, "b own n d"],
    past_k: NVFP4,
    past_v: NVFP4,
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
    offset: Float[Array, "b slots 1 n d"] | None = None,
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
    return merge_by_lse(*parts).astype(own_v.dtype)


def attend_packed(
    q: Float[Array, "b q n d"],
    k: NVFP4,
    v: NVFP4,
    q_tokens: Tokens,
    k_tokens: Tokens,
    offset: Float[Array, "b slots 1 n d"] | None = None,
    *,
    interpret: Any = None,
) -> tuple[Float[Array, "b q n d"], Float[Array, "b q n"]]:
    """`attention_with_lse` for packed keys and values only."""
    length = q.shape[1]
    padded = jnp.pad(q, ((0, 0), (0, -length % TILES.rows), (0, 0), (0, 0)))
    if is_concrete(q_tokens, k_tokens):
        with concrete_evaluation():
            columns, tiles = _mask(q_tokens, k_tokens)
    else:
        columns, tiles = _mask(q_tokens, k_tokens)
    out, lse = forward(
        padded, kernel_inputs(padded, k, v, offset), columns, tiles, TILES, interpret=interpret
    )
    lse = jnp.where(lse >= -MASKED, -jnp.inf, lse * math.log(2))
    return out[:, :length], jnp.swapaxes(lse[..., :length], 1, 2)


def _mask(q_tokens: Tokens, k_tokens: Tokens) -> tuple[MaskColumns, TileMap]:
    q, k = pad_tokens(q_tokens, TILES.rows), pad_tokens(k_tokens, TILES.keys)
    tiles = tile_map(q, k, q_tile=TILES.rows, k_tile=TILES.keys, rows="query")
    return mask_columns(q, k), tiles


def kernel_inputs(
    q: Float[Array, "b q n d"], k: NVFP4, v: NVFP4, offset: Float[Array, "b slots 1 n d"] | None
) -> PackedKeysValues:
    """Builds the kernel's inputs.

    Codes are not moved. Scales, a ninth of the bytes, are transposed so that those of a tile are
    contiguous.
    """
    flat = [x.codes.reshape(x.shape[0], -1, *x.shape[3:]) for x in (k, v)]
    global_scales = [x.amax / jnp.float32(amax_divisor(x.rule)) for x in (k, v)]
    shift = None
    if offset is not None:
        scale = q.shape[-1] ** -0.5 * LOG2_E
        shift = jnp.einsum(
            "bqnd,bsnd->bnsq", q.astype(jnp.float32), offset[:, :, 0].astype(jnp.float32) * scale
        )
    scales = jnp.concatenate([_tile_scales(x) for x in (k, v)], axis=-1)
    return PackedKeysValues(flat[0], flat[1], scales, jnp.stack(global_scales, axis=-1), shift)


def _tile_scales(x: NVFP4) -> Float[Array, "b n tiles d/16 keys"]:
    b, _, _, n, d = x.shape
    tiles = x.scales.reshape(b, -1, TILES.keys, n, d // 16)
    return jnp.transpose(tiles, (0, 3, 1, 4, 2)).astype(SCALE_DTYPE)


def merge_by_lse(*parts: tuple[Array, Array]) -> Float[Array, "b q n d"]:
    """Merges (out, lse) of attention over disjoint sets of keys.

    Computed in float32; fully masked queries give zeros.
    """
    top = jnp.maximum(*(lse for _, lse in parts))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = [jnp.exp(lse - top) for _, lse in parts]
    total = jnp.maximum(sum(weights[1:], weights[0]), 1e-30)
    sums = [
        out.astype(jnp.float32) * w[..., None] for (out, _), w in zip(parts, weights, strict=True)
    ]
    return sum(sums[1:], sums[0]) / total[..., None]


def _slice_tokens(tokens: Tokens, start: int, stop: int) -> Tokens:
    columns: list[Any] = [getattr(tokens, name)[..., start:stop] for name in VISIBILITY_COLUMNS]
    return Tokens(tokens.pos[..., start:stop, :], *columns)


def example_call(width: int = 128, *, offset: bool = True) -> tuple[Callable, tuple]:
    """The kernel for packed keys and abstract arguments to compile it with.

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
    mean = struct((1, slots, 1, heads, width), jnp.bfloat16) if offset else None
    q = struct((1, length, heads, width), jnp.bfloat16)
    pair = op.single_chunk_tokens(length), op.single_chunk_tokens(slots * tokens)
    return lambda q, k, v, mean: attend_packed(q, k, v, *pair, mean), (q, packed, packed, mean)


CATALOG = {"attention_packed": (("sm_100a",), example_call, (r"UTCHMMA", r"F2FP\.F16\.E2M1\."))}
"""Kernel name -> (architectures, builder, patterns of required SASS instructions)."""
