"""The NVFP4 array, its packed bytes, and the scale layout of tensor cores.

A value is `code * scale * amax / (M2 * M3)`. `code` is one of 0, .5, 1, 1.5, 2, 3, 4, 6 with a sign
(E2M1), `scale` is a float8 per 16 values of the last axis (E4M3), `amax` is the largest magnitude
of the tensor, and (M2, M3) are constants of the rule that chose the scales.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Shaped, UInt8

CODE_DTYPE = jnp.float4_e2m1fn
SCALE_DTYPE = jnp.float8_e4m3fn
BLOCK = 16
"""Values of the last axis that share a scale."""

Rule = Literal["static_6", "static_4", "mse", "mae", "abs_max"]
"""Rule that chooses the scale of a block (paper, appendix F). The largest magnitude is mapped to 6
(static_6), to 4 (static_4), or to whichever of the two has the smaller error ("4-over-6"): in the
sum of squares (mse), the sum of magnitudes (mae) or the maximum (abs_max)."""
RULES: tuple[Rule, ...] = get_args(Rule)

StochasticRounding = Literal["unbiased", "reference"]
"""Kind of stochastic rounding. "unbiased": scales are rounded up, so that no value saturates, and
rules that search compare codes rounded to nearest, before noise is drawn; the mean over the noise
is the value. "reference", as published: scales are rounded to nearest, so that the largest values
of a block may saturate, and rules that search compare rounded candidates, which prefers noise that
errs less."""
ScaleLayout = Literal["rows", "tiles"]
"""Order of the scales: row by row, [*rows, k / 16], or in tensor cores' tiles (`to_tiles`)."""


LIMITS: Mapping[Rule, tuple[float, float]] = MappingProxyType(
    {
        "static_6": (6.0, 448.0),
        "static_4": (4.0, 448.0),
        "mse": (6.0, 256.0),
        "mae": (6.0, 256.0),
        "abs_max": (6.0, 256.0),
    }
)
"""(M2, M3): the code and the scale to which `amax` is mapped. 256 leaves room below 448 for the
scale of a largest code of 4, which is 1.5 times as large."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NVFP4:
    """A quantized array with the values `codes * scales * amax / (M2 * M3)`; a pytree.

    All leaves start with the same `lead` axes (none if `amax` is a scalar), so `lax.scan` and
    `jax.tree.map` of gathers and slices work over those axes. Blocks of 16x16 repeat their scale
    over the 16 rows.

    Attributes:
      codes: float4_e2m1fn, two per byte on the device.
      scales: float8_e4m3fn block scales.
      amax: largest magnitude, one per entry of the leading axes.
      rule: rule that chose the scales.
      scale_layout: order of the scales; "tiles" needs matrices, [*lead, m, k].
    """

    codes: Float[Array, "*rows k"]
    scales: Float[Array, "..."]
    amax: Float32[Array, "*lead"]
    rule: Rule = dataclasses.field(metadata={"static": True})
    scale_layout: ScaleLayout = dataclasses.field(default="rows", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return tuple(self.codes.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return self.codes.size

    @property
    def lead(self) -> int:
        """Number of leading axes whose entries have their own `amax`."""
        return len(self.amax.shape)

    @property
    def row_scales(self) -> Float[Array, "*rows k/16"]:
        """The scales row by row."""
        if self.scale_layout == "rows":
            return self.scales
        return from_tiles(self.scales, self.shape[-2], self.shape[-1] // BLOCK)

    @property
    def nbytes(self) -> int:
        """Bytes on the device: 1/2 per code, 1 per scale, 4 per `amax`."""
        return self.codes.size // 2 + self.scales.size + 4 * self.amax.size

    def __len__(self) -> int:
        return self.shape[0]


def amax_divisor(rule: Rule) -> float:
    """M2 * M3 of a rule."""
    code, scale = LIMITS[rule]
    return code * scale


def expand_amax(amax: Array, ndim: int) -> Array:
    """`amax` with trailing axes of length 1, broadcastable to an array of `ndim` axes."""
    return jnp.reshape(amax, amax.shape + (1,) * (ndim - amax.ndim))


def dequantize_reference(a: NVFP4, dtype: jnp.dtype = jnp.float32) -> Array:
    """Reference dequantization, rounded once from float32; NaN where a scale or `amax` is NaN.

    `code * scale` has six significant bits, so the product with `amax / (M2 * M3)` is the only
    other rounding.
    """
    codes = a.codes.astype(jnp.float32).reshape(*a.shape[:-1], -1, BLOCK)
    values = codes * a.row_scales.astype(jnp.float32)[..., None]
    return round_to((values * expand_amax(global_scale(a), values.ndim)).reshape(a.shape), dtype)


def round_to(x: Float32[Array, "*n"], dtype: jnp.dtype) -> Float[Array, "*n"]:
    """Rounds `x` to `dtype`, even if it is cast back to float32: XLA removes such casts."""
    kind = jnp.finfo(dtype)
    narrow = kind.bits < 32
    return (lax.reduce_precision(x, kind.nexp, kind.nmant) if narrow else x).astype(dtype)


def global_scale(a: NVFP4) -> Float32[Array, "*lead"]:
    """The per-tensor scale amax / (M2 * M3), i.e. the value of code 1 with scale 1."""
    divisor = jnp.full_like(a.amax, amax_divisor(a.rule))
    return a.amax / lax.optimization_barrier(
        divisor
    )  # keeps a division, not a product with the inverse


def pack(codes: Float[Array, "*rows k"]) -> UInt8[Array, "*rows k/2"]:
    """Packs two codes per byte, the even column in the low half."""
    if codes.shape[-1] % 2:
        raise ValueError(f"the number of codes per row must be even, got {codes.shape[-1]}")
    pairs = jnp.asarray(codes, CODE_DTYPE).reshape(*codes.shape[:-1], -1, 2)
    return lax.bitcast_convert_type(pairs, jnp.uint8)


def unpack(packed: UInt8[Array, "*rows k/2"]) -> Float[Array, "*rows k"]:
    """Unpacks the codes of `pack`."""
    pairs = lax.bitcast_convert_type(jnp.asarray(packed, jnp.uint8), CODE_DTYPE)
    return pairs.reshape(*packed.shape[:-1], -1)


TILE_ROWS, TILE_COLUMNS = 128, 4
"""Tile of scales that tensor cores read at once."""


def swizzle(scales: Shaped[Array, "*batch r c"]) -> Shaped[Array, "*batch n"]:
    """Reorders scales for `tcgen05` block-scaled products: flat, padded with zeros.

    Tiles of 128 rows and 4 columns follow each other in row-major order; within a tile, entry
    (r, c) is at `(r % 32) * 16 + (r // 32) * 4 + c`. `n` is r rounded up to a multiple of 128 times
    c rounded up to a multiple of 4.
    """
    *batch, rows, columns = scales.shape
    down, right = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    edges = (0, down * TILE_ROWS - rows), (0, right * TILE_COLUMNS - columns)
    padded = jnp.pad(scales, [*[(0, 0)] * len(batch), *edges])
    tiles = padded.reshape(*batch, down, 4, 32, right, TILE_COLUMNS)
    return jnp.moveaxis(tiles, (-2, -3), (-4, -3)).reshape(*batch, -1)


def unswizzle(
    flat: Shaped[Array, "*batch n"], rows: int, columns: int
) -> Shaped[Array, "*batch rows columns"]:
    """The inverse of `swizzle`; raises ValueError if `flat` does not have that shape's size."""
    *batch, size = flat.shape
    down, right = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    if size != down * right * TILE_ROWS * TILE_COLUMNS:
        wants = down * right * TILE_ROWS * TILE_COLUMNS
        raise ValueError(f"{rows} rows of {columns} blocks need {wants} scales, got {size}")
    tiles = flat.reshape(*batch, down, right, 32, 4, TILE_COLUMNS)
    padded = jnp.moveaxis(tiles, (-4, -3), (-2, -3))
    padded = padded.reshape(*batch, down * TILE_ROWS, right * TILE_COLUMNS)
    return padded[..., :rows, :columns]


def to_tiles(scales: Shaped[Array, "*batch r c"]) -> Shaped[Array, "*batch r/128 c/4 32 16"]:
    """Scales in tiles of `swizzle`, as an array of tiles: shards of whole tiles are slices of it.

    Entries of the padding are zero.
    """
    *batch, rows, columns = scales.shape
    down, right = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    return swizzle(scales).reshape(*batch, down, right, 32, 4 * TILE_COLUMNS)


def from_tiles(
    tiles: Shaped[Array, "*batch down right 32 16"], rows: int, columns: int
) -> Shaped[Array, "*batch rows columns"]:
    """The inverse of `to_tiles`; raises ValueError if the number of tiles is another."""
    return unswizzle(tiles.reshape(*tiles.shape[:-4], -1), rows, columns)


def with_scale_layout(a: NVFP4, layout: ScaleLayout) -> NVFP4:
    """`a` with its scales in another order; raises ValueError unless `a` has matrices."""
    if a.scale_layout == layout:
        return a
    if a.ndim != a.lead + 2:
        raise ValueError(f"scale tiles need matrices, [*lead, m, k], got {a.shape} with {a.lead}")
    scales = to_tiles(a.scales) if layout == "tiles" else a.row_scales
    return dataclasses.replace(a, scales=scales, scale_layout=layout)
