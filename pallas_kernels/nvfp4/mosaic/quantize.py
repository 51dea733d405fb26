"""Quantization to NVFP4 on Blackwell: x is read once, codes and scales are written once.

A thread holds whole blocks in registers (`blocks`), so the search for the better of two scales, the
rotation and the rounding cost arithmetic but no memory traffic. There are four kernels: blocks
along rows, blocks along columns (the result is transposed), both at once, and tiles of 16x16.

Codes and scales equal `reference.quantize` bit for bit, except with the rotation, whose sums are
rounded in another order, and with compilers that fuse a product and a sum.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32

from pallas_kernels.nvfp4.format import BLOCK, NVFP4, Rule
from pallas_kernels.nvfp4.mosaic import tiles
from pallas_kernels.nvfp4.mosaic.blocks import (
    GROUP,
    BlockGroups,
    QuantizeOptions,
    as_uint32,
    centred_noise,
    encode_groups,
    join,
    load,
    load_column,
    rotate,
    split,
    store,
    thread_index,
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
WIDE = 16 * GROUP
"""Columns of x that both orientations read while they are in the cache."""
WARPGROUPS = 2
"""Warpgroups of a program that quantizes both orientations."""
OptionsPair = tuple[QuantizeOptions, QuantizeOptions]
"""Options for x and for its transpose."""


def quantize(
    x: Float[Array, "*lead_rows k"],
    amax: Float32[Array, "*lead"],
    *,
    rule: Rule = "mse",
    block_rows: int = 1,
    key: Array | None = None,
    transpose: bool = False,
    hadamard: bool = False,
    interpret: Any = None,
) -> NVFP4:
    """`api.quantize` of bfloat16 or float32 `x` with a given `amax`, for any number of rows.

    `amax` is that of the rotated `x` if `hadamard`. A `key` selects stochastic rounding.
    `interpret` (`plgpu.InterpretGPUParams`) runs the kernel in the interpreter. Raises
    `Unsupported` on devices other than Blackwell and ValueError for shapes that do not match.
    """
    check_device("quantize", interpret)
    _check_shapes(x, amax, transpose=transpose, block_rows=block_rows)
    options, words = QuantizeOptions(rule, hadamard, key is not None), _seed_words(key)
    if block_rows == 1 and not transpose:
        stacked = x.reshape(amax.size, -1, x.shape[-1])
        codes, scales = _rows(stacked, amax.reshape(-1), words, options, interpret)
        return NVFP4(codes.reshape(x.shape), scales.reshape(*x.shape[:-1], -1), amax, rule)
    stacked, amaxes = _stacked(x), _amax_per_entry(amax, x)
    if block_rows == 1:
        codes, scales = _columns(stacked, amaxes, words, options, interpret)
    else:
        codes, scales = tiles.quantize(stacked, amaxes, words, options, transpose, interpret)
    shape = (*x.shape[:-2], *codes.shape[1:])
    return NVFP4(codes.reshape(shape), scales.reshape(*shape[:-1], -1), amax, rule)


def quantize_both(
    x: Float[Array, "*lead m k"],
    amax: Float32[Array, "*lead"],
    amax_transposed: Float32[Array, "*lead"],
    *,
    rule: Rule = "mse",
    keys: tuple[Array | None, Array | None] = (None, None),
    hadamard: tuple[bool, bool] = (False, True),
    interpret: Any = None,
) -> tuple[NVFP4, NVFP4]:
    """Quantizes x and its transpose in blocks of 1x16, in one pass over x.

    Training needs both for activations and gradients: x for a product over channels, and the
    rotated transpose for a product over tokens. `amax`, `keys` and `hadamard` come in pairs, for x
    and for the transpose. If k is not a multiple of 128, x is read twice. Raises like `quantize`.
    """
    check_device("quantize", interpret)
    for transpose in (False, True):
        _check_shapes(x, amax, transpose=transpose, block_rows=1)
    # 1. Two passes if k does not split into groups.
    pair = (amax, amax_transposed)
    if x.shape[-1] % GROUP:
        plain, transposed = (
            quantize(
                x, most, rule=rule, key=key, transpose=bool(i), hadamard=rht, interpret=interpret
            )
            for i, (most, key, rht) in enumerate(zip(pair, keys, hadamard, strict=True))
        )
        return plain, transposed
    # 2. Otherwise one kernel for both.
    options_pair = (
        QuantizeOptions(rule, hadamard[0], keys[0] is not None),
        QuantizeOptions(rule, hadamard[1], keys[1] is not None),
    )
    words = jnp.concatenate([_seed_words(key) for key in keys])
    amaxes = jnp.concatenate([_amax_per_entry(most, x) for most in pair])
    results = _both(_stacked(x), amaxes, words, options_pair, interpret)
    shapes = x.shape, (*x.shape[:-2], x.shape[-1], x.shape[-2])
    plain, transposed = (
        NVFP4(codes.reshape(shape), scales.reshape(*shape[:-1], -1), most, rule)
        for (codes, scales), shape, most in zip(results, shapes, pair, strict=True)
    )
    return plain, transposed


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

    def source(_):
        block = load(x.at[*at, :])
        return join(rotate(split(block))) if args.options.hadamard else block

    def noise(_):
        block = as_uint32(args.entry * number + start) + thread_index()
        return centred_noise(args.words, block * jnp.uint32(BLOCK))

    def write(_, block_codes):
        store(codes.at[*at, :], block_codes)

    groups = BlockGroups(1, source, noise, write)
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

    def source(_):
        rows = [load_column(x.at[args.entry, block * BLOCK + i, own]) for i in range(BLOCK)]
        return join(rotate(rows) if args.options.hadamard else rows)

    def noise(_):
        row = as_uint32(args.entry * k + column) + thread_index()
        return centred_noise(args.words, row * jnp.uint32(m) + as_uint32(block * BLOCK))

    def write(_, block_codes):
        store(codes.at[args.entry, own, block, :], block_codes)

    groups = BlockGroups(1, source, noise, write)
    store(scales.at[args.entry, own, block], encode_groups(groups, args.amax, args.options))


def _both(x: Array, amax: Array, words: Array, options_pair: OptionsPair, interpret: Any):
    """Quantizes x [lead, m, k] along rows and along columns.

    A program takes 16 rows (`WIDE` columns of them if k is a multiple), first along rows and then,
    from the cache, along columns. `amax` and `words` of both results are concatenated.
    """
    lead, m, k = x.shape
    part = WIDE if k % WIDE == 0 else k
    rounds, blocks = part // GROUP, k // BLOCK
    turns = -(-rounds // WARPGROUPS)

    def body(flat, x, amax, words, codes, scales, codes_t, scales_t):
        entry, down, piece = (lax.axis_index(name) for name in ("lead", "blocks", "pieces"))
        most = amax[entry], amax[lead + entry]
        pairs = (words[0], words[1]), (words[2], words[3])
        by_row, by_column = (
            ProgramArgs(*values, entry) for values in zip(options_pair, most, pairs, strict=True)
        )

        def for_each_group(step):
            @pl.loop(0, turns)
            def _turn(i):
                group = i * WARPGROUPS + lax.axis_index("warpgroup")
                pl.when(group < rounds)(lambda: step(group))

        def across(group):  # 128 blocks of one row, or contiguous ones of several rows
            start = down * k + group * GROUP
            if part < k:
                start = (down * BLOCK + group) * blocks + piece * GROUP
            _row_group(flat, codes, scales, by_row, start, m * blocks)

        for_each_group(across)
        for_each_group(
            lambda i: _column_group(
                x, codes_t, scales_t, by_column, piece * part + i * GROUP, down, k
            )
        )

    out = (*outputs((lead, m * blocks)), *outputs((lead, k, m // BLOCK)))
    grid = {"pieces": k // part, "blocks": m // BLOCK, "lead": lead}
    run = kernel(body, out, grid, warpgroups=WARPGROUPS, interpret=interpret)
    codes, scales, codes_t, scales_t = run(x.reshape(lead, -1, BLOCK), x, amax, words)
    return (codes, scales), (codes_t, scales_t)
