"""Attention to own keys in bfloat16 and to packed ones: two kernels, merged by log-sum-exp.

The current chunk takes the kernel of `op`, the past that of `packed_forward`. One kernel with two
kinds of tiles would spare a pass over the output (43 MB a layer of the 5B model, some 10 us of a
millisecond) at the price of a second way for tiles to arrive; and the first kernel is tested as it
is. The merge is in float32.
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
from pallas_kernels.attention.mosaic.parts import LOG2_E, MASKED
from pallas_kernels.attention.mosaic.targets import BLACKWELL
from pallas_kernels.attention.tilemap import TileMap, at_once, known, pad_tokens, tile_map
from pallas_kernels.nvfp4.format import BLOCK, CODE, NVFP4, SCALE, constant
from pallas_kernels.tokens import COLUMNS, Tokens

TILES = PackedTiles()


def refusal(
    q: Array | jax.ShapeDtypeStruct, past: NVFP4, offset: Array | jax.ShapeDtypeStruct | None
) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    if jnp.dtype(q.dtype) != jnp.bfloat16:
        return f"it takes bfloat16 queries, not {jnp.dtype(q.dtype)}"
    if q.shape[-1] not in op.WIDTHS:
        return f"heads are {q.shape[-1]} wide; it takes {' or '.join(map(str, op.WIDTHS))}"
    if past.shape[-3] % TILES.keys:
        return f"a slot holds {past.shape[-3]} tokens; it takes multiples of {TILES.keys}"
    if offset is not None and offset.shape[-3] != 1:
        return "it restores a mean a channel, not one a token"
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
    """As `attention_packed`, where `refusal` has nothing to say. `interpret` simulates."""
    _, slots, m, _, _ = past_k.shape
    own = own_k.shape[1]
    if q_tokens is None or k_tokens is None:
        q_tokens, k_tokens = op.one_chunk(q.shape[1]), op.one_chunk(own + slots * m)
    own_tokens, past_tokens = _part(k_tokens, 0, own), _part(k_tokens, own, own + slots * m)
    mask = op.mask_of(q_tokens, own_tokens, target=BLACKWELL)
    parts = (
        op.attend_mask(q, own_k, own_v, mask, interpret=interpret),
        attend_past(q, past_k, past_v, q_tokens, past_tokens, offset, interpret=interpret),
    )
    return merged(*parts).astype(own_v.dtype)


def attend_past(
    q: Float[Array, "b q n d"],
    k: NVFP4,
    v: NVFP4,
    q_tokens: Tokens,
    k_tokens: Tokens,
    offset: Float[Array, "b slots 1 n d"] | None = None,
    *,
    interpret: Any = None,
) -> tuple[Float[Array, "b q n d"], Float[Array, "b q n"]]:
    """Attention to packed keys alone, and its log-sum-exp, as `attention_with_lse`."""
    length = q.shape[1]
    padded = jnp.pad(q, ((0, 0), (0, -length % TILES.rows), (0, 0), (0, 0)))
    if known(q_tokens, k_tokens):
        with at_once():
            columns, tiles = _mask(q_tokens, k_tokens)
    else:
        columns, tiles = _mask(q_tokens, k_tokens)
    out, lse = forward(
        padded, laid_out(padded, k, v, offset), columns, tiles, TILES, interpret=interpret
    )
    lse = jnp.where(lse >= -MASKED, -jnp.inf, lse * math.log(2))
    return out[:, :length], jnp.swapaxes(lse[..., :length], 1, 2)


def _mask(q_tokens: Tokens, k_tokens: Tokens) -> tuple[MaskColumns, TileMap]:
    q, k = pad_tokens(q_tokens, TILES.rows), pad_tokens(k_tokens, TILES.keys)
    tiles = tile_map(q, k, q_tile=TILES.rows, k_tile=TILES.keys, rows="query")
    return mask_columns(q, k), tiles


def laid_out(
    q: Float[Array, "b q n d"], k: NVFP4, v: NVFP4, offset: Float[Array, "b slots 1 n d"] | None
) -> PackedKeysValues:
    """What the kernel reads. Codes stay where they are; scales, a ninth of the bytes, are laid out
    anew so that those of a tile lie together."""
    flat = [x.codes.reshape(x.shape[0], -1, *x.shape[3:]) for x in (k, v)]
    units = [x.amax / jnp.float32(constant(x.rule)) for x in (k, v)]
    shift = None
    if offset is not None:
        scale = q.shape[-1] ** -0.5 * LOG2_E
        shift = jnp.einsum(
            "bqnd,bsnd->bnsq", q.astype(jnp.float32), offset[:, :, 0].astype(jnp.float32) * scale
        )
    scales = jnp.concatenate([_in_tiles(x) for x in (k, v)], axis=-1)
    return PackedKeysValues(flat[0], flat[1], scales, jnp.stack(units, axis=-1), shift)


def _in_tiles(x: NVFP4) -> Float[Array, "b n tiles d/16 keys"]:
    b, _, _, n, d = x.shape
    tiles = x.scales.reshape(b, -1, TILES.keys, n, d // 16)
    return jnp.transpose(tiles, (0, 3, 1, 4, 2)).astype(SCALE)


def merged(*parts: tuple[Array, Array]) -> Float[Array, "b q n d"]:
    """Attention over the union of disjoint sets of keys, in float32; zeros where none is seen."""
    top = jnp.maximum(*(lse for _, lse in parts))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = [jnp.exp(lse - top) for _, lse in parts]
    total = jnp.maximum(sum(weights[1:], weights[0]), 1e-30)
    sums = [
        out.astype(jnp.float32) * w[..., None] for (out, _), w in zip(parts, weights, strict=True)
    ]
    return sum(sums[1:], sums[0]) / total[..., None]


def _part(tokens: Tokens, start: int, stop: int) -> Tokens:
    columns: list[Any] = [getattr(tokens, name)[..., start:stop] for name in COLUMNS]
    return Tokens(tokens.pos[..., start:stop, :], *columns)


def built(width: int = 128, *, offset: bool = True) -> tuple[Callable, tuple]:
    """The kernel for the past and abstract arguments: two heads and three slots of 640 tokens, of
    which nothing in it depends on but the bounds of loops."""
    length, slots, tokens, heads = 256, 3, 640, 2
    shape = (1, slots, tokens, heads)
    struct: Any = jax.ShapeDtypeStruct
    codes, scales = struct((*shape, width), CODE), struct((*shape, width // BLOCK), SCALE)
    packed = NVFP4(codes, scales, struct((1, slots), jnp.float32), "mse")
    mean = struct((1, slots, 1, heads, width), jnp.bfloat16) if offset else None
    q = struct((1, length, heads, width), jnp.bfloat16)
    seen = op.one_chunk(length), op.one_chunk(slots * tokens)
    return lambda q, k, v, mean: attend_past(q, k, v, *seen, mean), (q, packed, packed, mean)


CATALOG = {"attention_packed": (("sm_100a",), built, (r"UTCHMMA", r"F2FP\.F16\.E2M1\."))}
"""Kernel -> architectures, what builds it, and the instructions that it is written for."""
