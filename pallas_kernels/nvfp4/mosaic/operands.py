"""Quantization of the operands of a product: x, its transpose, or both, from one read of x.

Scales are written in the tiles that tensor cores read (`format.to_tiles`). A program takes 64 rows
and 128 columns of x: first its blocks along rows, then, from the cache, its blocks along columns. A
group of 128 blocks is a part of one scale tile: 32 of its rows and all 4 columns.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.nvfp4.format import BLOCK, TILE_COLUMNS, TILE_ROWS
from pallas_kernels.nvfp4.mosaic.blocks import (
    ACROSS_ROWS,
    ALONG_ROWS,
    E2M1,
    E4M3,
    BlockGroups,
    QuantizeOptions,
    as_uint32,
    centred_noise,
    encode_groups,
    rotate,
    store,
)
from pallas_kernels.nvfp4.mosaic.launch import ProgramArgs, kernel

ROWS, COLUMNS = 64, 128
"""Part of x that a program quantizes."""
PART = 32
"""Rows of an operand in a group of blocks."""
WARPGROUPS = 2
Options = tuple[QuantizeOptions | None, QuantizeOptions | None]
"""Options for x and for its transpose; None leaves one out."""


def refusal(m: int, k: int) -> str | None:
    """The reason why the kernel does not support matrices of this size, or None."""
    if m % ROWS or k % COLUMNS or not m * k:
        return f"m must be a multiple of {ROWS} and k of {COLUMNS}, got {m} and {k}"
    return None


def quantize(
    x: Array, amax: Array, words: Array, options: Options, interpret: Any
) -> list[tuple[Array, Array]]:
    """Codes [lead, m, k] and scale tiles of x [lead, m, k] and of its transpose, as `options` ask.

    `amax` [2 * lead] and `words` [4] hold the values of x and then those of the transpose.
    """
    lead, m, k = x.shape
    shapes = [
        (_codes_shape(lead, m, k), _scales_shape(lead, m, k)),
        ((lead, k, m // BLOCK, BLOCK), _scales_shape(lead, k, m)),
    ]
    wanted = [shape for shape, how in zip(shapes, options, strict=True) if how is not None]

    by_block = (lead, m // BLOCK, BLOCK, k)

    def body(along, *rest):
        # The interpreter cannot reshape references, so it gets x twice.
        across, amax, words, *outputs = rest if interpret else (along.reshape(by_block), *rest)
        entry = lax.axis_index("lead")
        pairs = iter(zip(outputs[::2], outputs[1::2], strict=True))
        for which, how in enumerate(options):
            if how is None:
                continue
            own = words[2 * which], words[2 * which + 1]
            args = ProgramArgs(how, amax[which * lead + entry], own, entry)
            _quantize_part(across if which else along, *next(pairs), args, bool(which), (m, k))

    outputs = [
        jax.ShapeDtypeStruct(*part)
        for codes, scales in wanted
        for part in ((codes, E2M1), (scales, E4M3))
    ]
    grid = {"columns": k // COLUMNS, "rows": m // ROWS, "lead": lead}
    run = kernel(body, tuple(outputs), grid, warpgroups=WARPGROUPS, interpret=interpret)
    views = [x.reshape(_codes_shape(lead, m, k)), *[x.reshape(by_block)] * bool(interpret)]
    results = run(*views, amax, words)
    operands = zip(results[::2], results[1::2], strict=True)
    sizes = [size for size, how in zip(((m, k), (k, m)), options, strict=True) if how is not None]
    return [
        (codes.reshape(lead, *size), scales.reshape(*scales.shape[:4], -1))
        for (codes, scales), size in zip(operands, sizes, strict=True)
    ]


def _codes_shape(lead: int, m: int, k: int) -> tuple[int, ...]:
    return lead, m // PART, PART, k // (TILE_COLUMNS * BLOCK), TILE_COLUMNS, BLOCK


def _scales_shape(lead: int, rows: int, k: int) -> tuple[int, ...]:
    """Scale tiles with the two indices of their columns apart: row // 32 and block."""
    down, right = -(-rows // TILE_ROWS), k // (TILE_COLUMNS * BLOCK)
    return lead, down, right, PART, TILE_ROWS // PART, TILE_COLUMNS


def _quantize_part(x, codes, scales, args: ProgramArgs, transposed: bool, size) -> None:
    """Quantizes one operand from a program's part of x [m, k], four groups of blocks."""
    row, column = (lax.axis_index(name) for name in ("rows", "columns"))
    groups = (ROWS // PART) * COLUMNS // (TILE_COLUMNS * BLOCK)

    @pl.loop(0, groups // WARPGROUPS)
    def _turn(i):
        group = i * WARPGROUPS + lax.axis_index("warpgroup")
        if transposed:
            _across(x, codes, scales, args, column * (COLUMNS // PART) + group, row, size[0])
        else:
            wide = COLUMNS // (TILE_COLUMNS * BLOCK)
            part = row * (ROWS // PART) + lax.div(group, jnp.int32(wide))
            _along(x, codes, scales, args, part, column * wide + lax.rem(group, wide), size)


def _along(x, codes, scales, args: ProgramArgs, part: Any, tile: Any, size) -> None:
    """Quantizes 32 rows and 4 blocks of x: rows from 32 * `part`, columns of a scale tile."""
    at = (args.entry, part, slice(None), tile)
    m, k = size
    block = ALONG_ROWS.load(x.at[at])
    if args.options.hadamard:
        block = ALONG_ROWS.join(rotate(ALONG_ROWS.split(block)))

    def noise(_):
        row = as_uint32(args.entry * m + part * PART) + ALONG_ROWS.index(0)
        column = as_uint32(tile * TILE_COLUMNS) + ALONG_ROWS.index(1)
        return centred_noise(ALONG_ROWS, args.words, row * jnp.uint32(k) + column * 16)

    def write(_, block_codes):
        store(codes.at[at], block_codes)

    groups = BlockGroups(ALONG_ROWS, 1, lambda _: block, noise, write)
    _store_scales(scales, args, part, tile, encode_groups(groups, args.amax, args.options))
    if m % TILE_ROWS:  # the second half of the last tiles is padding

        @pl.when(part * PART >= m - ROWS)
        def _padding():
            zeros = ALONG_ROWS.zeros(per_block=True).astype(E4M3)
            _store_scales(scales, args, part + ROWS // PART, tile, zeros)


def _across(x, codes, scales, args: ProgramArgs, part: Any, tile: Any, m: int) -> None:
    """Quantizes 32 columns and 4 blocks of 16 rows: columns from 32 * `part` of x."""
    rows = pl.ds(tile * TILE_COLUMNS, TILE_COLUMNS)
    own = pl.ds(part * PART, PART)
    k = codes.shape[1]
    values = [
        ACROSS_ROWS.load_column(x.at[args.entry, rows, i, own].transpose((1, 0)))
        for i in range(BLOCK)
    ]
    block = ACROSS_ROWS.join(rotate(values) if args.options.hadamard else values)

    def noise(_):
        row = as_uint32(args.entry * k + part * PART) + ACROSS_ROWS.index(0)
        column = as_uint32(tile * TILE_COLUMNS) + ACROSS_ROWS.index(1)
        return centred_noise(ACROSS_ROWS, args.words, row * jnp.uint32(m) + column * 16)

    def write(_, block_codes):
        store(codes.at[args.entry, own, rows], block_codes)

    groups = BlockGroups(ACROSS_ROWS, 1, lambda _: block, noise, write)
    _store_scales(scales, args, part, tile, encode_groups(groups, args.amax, args.options))


def _store_scales(scales, args: ProgramArgs, part: Any, tile: Any, values: Any) -> None:
    """Stores the scales of 32 rows and 4 blocks, a quarter of a tile."""
    parts = TILE_ROWS // PART
    down, quarter = lax.div(part, jnp.int32(parts)), lax.rem(part, jnp.int32(parts))
    store(scales.at[args.entry, down, tile, :, quarter, :], values)
