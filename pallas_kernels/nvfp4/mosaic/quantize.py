"""Quantization to NVFP4 on Blackwell: x is read once, codes and scales are written once.

A thread holds whole blocks in registers (`blocks`), so the search for the better of two scales, the
rotation and the rounding cost arithmetic but no memory traffic. There are four kernels: blocks
along rows, blocks along columns (the result is transposed), either or both of them with scale tiles
(`operands`), and squares of 16x16 (`tiles`).

Codes and scales equal `reference.quantize` bit for bit, except with the rotation, whose sums are
rounded in another order, and with compilers that fuse a product and a sum.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32

from pallas_kernels.nvfp4.format import (
    BLOCK,
    NVFP4,
    Rule,
    ScaleLayout,
    StochasticRounding,
    with_scale_layout,
)
from pallas_kernels.nvfp4.mosaic import operands, tiles
from pallas_kernels.nvfp4.mosaic.blocks import (
    CONSECUTIVE,
    GROUP,
    BlockGroups,
    QuantizeOptions,
    as_uint32,
    centred_noise,
    encode_groups,
    rotate,
    store,
)
from pallas_kernels.nvfp4.mosaic.launch import (
    ProgramArgs,
    WorkPartition,
    check_device,
    kernel,
    outputs,
    pad_to,
)
from pallas_kernels.nvfp4.rounding import seeds

ROW_GROUPS = 4
"""Groups of 128 blocks per program along rows."""
COLUMN_BLOCKS = 4
"""Blocks per program along a column: 32 bytes of codes, the granularity of memory writes."""


def quantize(
    x: Float[Array, "*lead_rows k"],
    amax: Float32[Array, "*lead"],
    *,
    rule: Rule = "mse",
    block_rows: int = 1,
    key: Array | None = None,
    stochastic: StochasticRounding = "unbiased",
    transpose: bool = False,
    hadamard: bool = False,
    scale_layout: ScaleLayout = "rows",
    interpret: Any = None,
) -> NVFP4:
    """`api.quantize` of bfloat16 or float32 `x` with a given `amax`, for any number of rows.

    `amax` is that of the rotated `x` if `hadamard`. A `key` selects stochastic rounding. Scale
    tiles are written by the kernel where `operands.refusal` allows, else XLA reorders the scales.
    `interpret` (`plgpu.InterpretGPUParams`) runs the kernel in the interpreter. Raises
    `Unsupported` on devices other than Blackwell and ValueError for shapes that do not match.
    """
    check_device("quantize", interpret)
    _check_shapes(x, amax, transpose=transpose, block_rows=block_rows)
    options, words = _options(rule, hadamard, key, stochastic), _seed_words(key)
    tiled = scale_layout == "tiles" and block_rows == 1 and x.ndim > 1
    if tiled and operands.refusal(*x.shape[-2:]) is None:
        pair = (None, options) if transpose else (options, None)
        amaxes, both_words = jnp.tile(_amax_per_entry(amax, x), 2), jnp.tile(words, 2)
        ((codes, scales),) = operands.quantize(_stacked(x), amaxes, both_words, pair, interpret)
        return _tiled(codes, scales, x.shape[:-2], amax, rule)
    if block_rows == 1 and not transpose:
        stacked = x.reshape(amax.size, -1, x.shape[-1])
        codes, scales = _rows(stacked, amax.reshape(-1), words, options, interpret)
        shape = x.shape
    else:
        squares = functools.partial(tiles.quantize, transpose=transpose)
        run = _columns if block_rows == 1 else squares
        stacked, amaxes = _stacked(x), _amax_per_entry(amax, x)
        codes, scales = run(stacked, amaxes, words, options, interpret=interpret)
        shape = (*x.shape[:-2], *codes.shape[1:])
    quantized = NVFP4(codes.reshape(shape), scales.reshape(*shape[:-1], -1), amax, rule)
    return with_scale_layout(quantized, scale_layout)


def quantize_both(
    x: Float[Array, "*lead m k"],
    amax: Float32[Array, "*lead"],
    amax_transposed: Float32[Array, "*lead"],
    *,
    rule: Rule = "mse",
    keys: tuple[Array | None, Array | None] = (None, None),
    stochastic: StochasticRounding = "unbiased",
    hadamard: tuple[bool, bool] = (False, True),
    interpret: Any = None,
) -> tuple[NVFP4, NVFP4]:
    """Quantizes x and its transpose in blocks of 1x16 with scale tiles, in one pass over x.

    Training needs both for activations and gradients: x for a product over channels, and the
    rotated transpose for a product over tokens. `amax`, `keys` and `hadamard` come in pairs, for x
    and for the transpose. Two kernels run where `operands.refusal` has a reason. Raises like
    `quantize`.
    """
    check_device("quantize", interpret)
    for transpose in (False, True):
        _check_shapes(x, amax, transpose=transpose, block_rows=1)
    pair = (amax, amax_transposed)
    if operands.refusal(*x.shape[-2:]) is not None:
        plain, transposed = (
            quantize(
                x, most, rule=rule, key=key, stochastic=stochastic, transpose=bool(i),
                hadamard=rotated, scale_layout="tiles", interpret=interpret,
            )
            for i, (most, key, rotated) in enumerate(zip(pair, keys, hadamard, strict=True))
        )  # fmt: skip
        return plain, transposed
    first, second = (
        _options(rule, rotated, key, stochastic)
        for rotated, key in zip(hadamard, keys, strict=True)
    )
    words = jnp.concatenate([_seed_words(key) for key in keys])
    amaxes = jnp.concatenate([_amax_per_entry(most, x) for most in pair])
    results = operands.quantize(_stacked(x), amaxes, words, (first, second), interpret)
    plain, transposed = (
        _tiled(codes, scales, x.shape[:-2], most, rule)
        for (codes, scales), most in zip(results, pair, strict=True)
    )
    return plain, transposed


def _options(
    rule: Rule, hadamard: bool, key: Array | None, stochastic: StochasticRounding
) -> QuantizeOptions:
    return QuantizeOptions(rule, hadamard, None if key is None else stochastic)


def _tiled(codes: Array, scales: Array, lead: tuple[int, ...], amax: Array, rule: Rule) -> NVFP4:
    """The result for codes [lead, m, k] and their scale tiles."""
    codes, scales = (a.reshape(*lead, *a.shape[1:]) for a in (codes, scales))
    return NVFP4(codes, scales, amax, rule, "tiles")


def _check_shapes(x: Array, amax: Array, *, transpose: bool, block_rows: int) -> None:
    if block_rows not in (1, BLOCK):
        raise ValueError(f"block_rows must be 1 or {BLOCK}, got {block_rows}")
    if amax.shape != x.shape[: amax.ndim] or amax.ndim + (transpose or block_rows > 1) >= x.ndim:
        raise ValueError(
            f"amax must have the shape of leading axes of x {x.shape}, got {amax.shape}"
        )
    contraction = x.shape[-2 if transpose else -1]
    if contraction % BLOCK:
        raise ValueError(
            f"the contraction axis must be a multiple of {BLOCK}, got {contraction}; pad it with "
            "zeros or leave this product unquantized"
        )


def _seed_words(key: Array | None) -> Array:
    return jnp.zeros(2, jnp.uint32) if key is None else seeds(key)


def _stacked(x: Array) -> Array:
    """Reshapes x to one leading axis and two others."""
    return x.reshape(-1, *x.shape[-2:])


def _amax_per_entry(amax: Array, x: Array) -> Array:
    """`amax` repeated for each entry of `_stacked(x)`."""
    return jnp.repeat(amax.reshape(-1), math.prod(x.shape[amax.ndim : -2]))


def _rows(x: Array, amax: Array, words: Array, options: QuantizeOptions, interpret: Any):
    """Quantizes contiguous blocks along the rows of x [lead, rows, k]."""
    lead, _, k = x.shape
    number = x.shape[1] * k // BLOCK
    blocks = pad_to(x.reshape(lead, number, BLOCK), 1, GROUP)
    partition = WorkPartition(blocks.shape[1], ROW_GROUPS)

    def body(x, amax, words, codes, scales):
        entry, program = lax.axis_index("lead"), lax.axis_index("programs")
        args = ProgramArgs(options, amax[entry], words, entry)
        partition.walk(program, lambda start: _row_group(x, codes, scales, args, start, number))

    grid = {"programs": partition.programs, "lead": lead}
    run = kernel(body, outputs((lead, blocks.shape[1])), grid, interpret=interpret)
    codes, scales = run(blocks, amax, words)
    return codes[:, :number], scales[:, :number]


def _row_group(x, codes, scales, args: ProgramArgs, start: Any, number: int) -> None:
    """Quantizes 128 blocks from index `start`; an entry has `number` blocks."""
    at = (args.entry, pl.ds(start, GROUP))
    values = CONSECUTIVE.load(x.at[*at, :])
    if args.options.hadamard:
        values = CONSECUTIVE.join(rotate(CONSECUTIVE.split(values)))

    def noise(_):
        block = as_uint32(args.entry * number + start) + CONSECUTIVE.index()
        return centred_noise(CONSECUTIVE, args.words, block * jnp.uint32(BLOCK))

    def write(_, block_codes):
        store(codes.at[*at, :], block_codes)

    groups = BlockGroups(CONSECUTIVE, 1, lambda _: values, noise, write)
    store(scales.at[*at], encode_groups(groups, args.amax, args.options))


def _columns(x: Array, amax: Array, words: Array, options: QuantizeOptions, interpret: Any):
    """Quantizes blocks along the columns of x [lead, m, k]; the result is transposed."""
    lead, m, k = x.shape
    x = pad_to(x, 2, GROUP)
    columns, blocks = (
        WorkPartition(x.shape[2], 1),
        WorkPartition(m // BLOCK, COLUMN_BLOCKS, width=1),
    )

    def body(x, amax, words, codes, scales):
        entry, across, down = (lax.axis_index(name) for name in ("lead", "columns", "blocks"))
        args = ProgramArgs(options, amax[entry], words, entry)

        def step(column):
            blocks.walk(down, lambda i: _column_group(x, codes, scales, args, column, i, k))

        columns.walk(across, step)

    grid = {"columns": columns.programs, "blocks": blocks.programs, "lead": lead}
    run = kernel(body, outputs((lead, x.shape[2], m // BLOCK)), grid, interpret=interpret)
    codes, scales = run(x, amax, words)
    return codes[:, :k].reshape(lead, k, m), scales[:, :k]


def _column_group(x, codes, scales, args: ProgramArgs, column: Any, block: Any, k: int) -> None:
    """Quantizes block `block` of 128 columns from index `column`; an entry has `k` columns."""
    own = pl.ds(column, GROUP)
    m = scales.shape[2] * BLOCK

    rows = [CONSECUTIVE.load_column(x.at[args.entry, block * BLOCK + i, own]) for i in range(BLOCK)]
    values = CONSECUTIVE.join(rotate(rows) if args.options.hadamard else rows)

    def noise(_):
        row = as_uint32(args.entry * k + column) + CONSECUTIVE.index()
        first = row * jnp.uint32(m) + as_uint32(block * BLOCK)
        return centred_noise(CONSECUTIVE, args.words, first)

    def write(_, block_codes):
        store(codes.at[args.entry, own, block, :], block_codes)

    groups = BlockGroups(CONSECUTIVE, 1, lambda _: values, noise, write)
    store(scales.at[args.entry, own, block], encode_groups(groups, args.amax, args.options))
