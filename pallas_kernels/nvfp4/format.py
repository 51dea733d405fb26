"""The NVFP4 array, its bytes in files, and the order in which tensor cores want its scales.

A value is `code * scale * amax / (M2 * M3)`: `code` is one of 0, .5, 1, 1.5, 2, 3, 4, 6 with a
sign (E2M1), `scale` a float8 for 16 neighbours of the last axis (E4M3), `amax` the largest
magnitude of the whole, and (M2, M3) belong to the rule by which the scales were chosen.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Shaped, UInt8

CODE = jnp.float4_e2m1fn
SCALE = jnp.float8_e4m3fn
BLOCK = 16
"""Neighbours of the last axis that share a scale."""

Rule = Literal["static_6", "static_4", "mse", "mae", "abs_max"]
"""How the scale of a block is chosen: its largest magnitude becomes 6, or 4, or that of the two
which errs less in the sum of squares, the sum of magnitudes or the maximum (paper App. F)."""
RULES: tuple[Rule, ...] = get_args(Rule)

LIMITS: Mapping[Rule, tuple[float, float]] = MappingProxyType(
    {
        "static_6": (6.0, 448.0),
        "static_4": (4.0, 448.0),
        "mse": (6.0, 256.0),
        "mae": (6.0, 256.0),
        "abs_max": (6.0, 256.0),
    }
)
"""(M2, M3): the code and the scale that `amax` gets. 256 leaves room for the scale of "becomes 4",
1.5 times as large, under 448."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NVFP4:
    """`codes * scales * amax / (M2 * M3)`, a pytree like any other.

    All leaves begin with the same `lead` axes (none if `amax` is a scalar), so that `lax.scan`,
    gathers and slices over those axes are `jax.tree.map`. Blocks of 16x16 repeat the scale over
    their 16 rows.
    """

    codes: Float[Array, "*rows k"]  # float4_e2m1fn, two a byte on the device
    scales: Float[Array, "*rows k/16"]  # float8_e4m3fn
    amax: Float32[Array, "*lead"]
    rule: Rule = dataclasses.field(metadata={"static": True})

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
        """How many leading axes have an `amax` of their own."""
        return len(self.amax.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on the device: half a byte a code, one a scale, four an `amax`."""
        return self.codes.size // 2 + self.scales.size + 4 * self.amax.size

    def __len__(self) -> int:
        return self.shape[0]


def constant(rule: Rule) -> float:
    """M2 * M3 of a rule."""
    code, scale = LIMITS[rule]
    return code * scale


def over(amax: Array, ndim: int) -> Array:
    """`amax` with axes of length 1 after its own, to go with an array of `ndim` axes."""
    return jnp.reshape(amax, amax.shape + (1,) * (ndim - amax.ndim))


def dequantize_reference(a: NVFP4, dtype: jnp.dtype = jnp.float32) -> Array:
    """The values, rounded once from float32 to `dtype`; NaN wherever the scale or `amax` is NaN.

    `code * scale` has six significant bits, so the product with `amax / (M2 * M3)` is the only
    rounding before that.
    """
    codes = a.codes.astype(jnp.float32).reshape(*a.shape[:-1], -1, BLOCK)
    values = codes * a.scales.astype(jnp.float32)[..., None]
    return rounded((values * over(unit(a), values.ndim)).reshape(a.shape), dtype)


def rounded(x: Float32[Array, "*n"], dtype: jnp.dtype) -> Float[Array, "*n"]:
    """`x` in `dtype`, rounded also if a cast back to float32 follows: XLA removes such pairs."""
    kind = jnp.finfo(dtype)
    narrow = kind.bits < 32
    return (lax.reduce_precision(x, kind.nexp, kind.nmant) if narrow else x).astype(dtype)


def unit(a: NVFP4) -> Float32[Array, "*lead"]:
    """What code 1 with scale 1 stands for: amax / (M2 * M3)."""
    whole = jnp.full_like(a.amax, constant(a.rule))
    return a.amax / lax.optimization_barrier(whole)  # a division, not a product with the inverse


def pack(codes: Float[Array, "*rows k"]) -> UInt8[Array, "*rows k/2"]:
    """Two codes a byte, the even column in the low half."""
    if codes.shape[-1] % 2:
        raise ValueError(f"{codes.shape[-1]} codes a row do not fill whole bytes; pad to even")
    pairs = jnp.asarray(codes, CODE).reshape(*codes.shape[:-1], -1, 2)
    return lax.bitcast_convert_type(pairs, jnp.uint8)


def unpack(packed: UInt8[Array, "*rows k/2"]) -> Float[Array, "*rows k"]:
    """The codes of `pack`'s bytes."""
    pairs = lax.bitcast_convert_type(jnp.asarray(packed, jnp.uint8), CODE)
    return pairs.reshape(*packed.shape[:-1], -1)


TILE_ROWS, TILE_COLUMNS = 128, 4
"""The scales that tensor cores read at once."""


def swizzle(scales: Shaped[Array, "*batch r c"]) -> Shaped[Array, "*batch n"]:
    """Scales in the order of `tcgen05` block-scaled products, flat, padded with zeros.

    Tiles of 128 rows and 4 columns follow each other row by row; within one, entry (r, c) is at
    `(r % 32) * 16 + (r // 32) * 4 + c`. `n` is `r` to the next 128 times `c` to the next 4.
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
    """What `swizzle` made `flat` of; raises ValueError if another shape did."""
    *batch, size = flat.shape
    down, right = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    if size != down * right * TILE_ROWS * TILE_COLUMNS:
        wants = down * right * TILE_ROWS * TILE_COLUMNS
        raise ValueError(f"{size} scales, but {rows} rows of {columns} blocks take {wants}")
    tiles = flat.reshape(*batch, down, right, 32, 4, TILE_COLUMNS)
    padded = jnp.moveaxis(tiles, (-4, -3), (-2, -3))
    padded = padded.reshape(*batch, down * TILE_ROWS, right * TILE_COLUMNS)
    return padded[..., :rows, :columns]
