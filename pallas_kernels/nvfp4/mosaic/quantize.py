"""Quantization to NVFP4 on Blackwell: x is read once, codes and scales are written once.

A thread holds whole blocks in registers (`blocks`), so the search for the better of two scales,
the rotation and the rounding cost arithmetic but no memory. Four programs of kernels: blocks along
rows, blocks along columns (the result is transposed), both at once, and tiles of 16x16.

Codes and scales are those of `reference.quantize` bit for bit, but for the rotation, whose sums are
rounded in another order, and for compilers that fuse a product and a sum.
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
    Form,
    Parts,
    draws,
    encode,
    join,
    load,
    load_column,
    numbers,
    rotate,
    split,
    unsigned,
)
from pallas_kernels.nvfp4.mosaic.launch import Cut, Task, at_least, check, kernel, outputs
from pallas_kernels.nvfp4.rounding import seeds

ROW_GROUPS = 4
"""Groups of 128 blocks that a program takes along rows."""
COLUMN_BLOCKS = 4
"""Blocks that a program takes along a column: 32 bytes of codes, what memory writes at once."""
WIDE = 16 * GROUP
"""Columns of a part of x that both orientations read while it is in the cache."""
WARPGROUPS = 2
"""Of a program that works in both orientations."""


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
    """`api.quantize` of bfloat16 or float32 `x` with a given `amax` (that of the rotated `x`, if
    `hadamard`), any number of rows. A key rounds stochastically.

    `interpret` (`plgpu.InterpretGPUParams`) simulates the kernel. Raises `Unsupported` off
    Blackwell, ValueError for shapes that do not fit.
    """
    check("quantize", interpret)
    _check_shapes(x, amax, transpose=transpose, block_rows=block_rows)
    form, words = Form(rule, hadamard, key is not None), _words(key)
    if block_rows == 1 and not transpose:
        stacked = x.reshape(amax.size, -1, x.shape[-1])
        codes, scales = _rows(stacked, amax.reshape(-1), words, form, interpret)
        return NVFP4(codes.reshape(x.shape), scales.reshape(*x.shape[:-1], -1), amax, rule)
    stacked, each = _stacked(x), _repeated(amax, x)
    if block_rows == 1:
        codes, scales = _columns(stacked, each, words, form, interpret)
    else:
        codes, scales = tiles.quantize(stacked, each, words, form, transpose, interpret)
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
    """x and its transpose, both quantized in blocks of 1x16, in one pass over x.

    That is what training asks of an activation and of a gradient: the first for a product over
    the channels, the second, rotated, for one over the tokens. `keys` and `hadamard` are those of
    x and of the transpose, and so are the two `amax`. Takes two passes where k is no multiple of
    128. Raises as `quantize`.
    """
    check("quantize", interpret)
    for transpose in (False, True):
        _check_shapes(x, amax, transpose=transpose, block_rows=1)
    given = (amax, amax_transposed)
    if x.shape[-1] % GROUP:
        plain, transposed = (
            quantize(
                x, most, rule=rule, key=key, transpose=bool(i), hadamard=turned, interpret=interpret
            )
            for i, (most, key, turned) in enumerate(zip(given, keys, hadamard, strict=True))
        )
        return plain, transposed
    forms = (
        Form(rule, hadamard[0], keys[0] is not None),
        Form(rule, hadamard[1], keys[1] is not None),
    )
    words = jnp.concatenate([_words(key) for key in keys])
    each = jnp.concatenate([_repeated(most, x) for most in given])
    results = _both(_stacked(x), each, words, forms, interpret)
    shapes = x.shape, (*x.shape[:-2], x.shape[-1], x.shape[-2])
    plain, transposed = (
        NVFP4(codes.reshape(shape), scales.reshape(*shape[:-1], -1), most, rule)
        for (codes, scales), shape, most in zip(results, shapes, given, strict=True)
    )
    return plain, transposed


def _check_shapes(x: Array, amax: Array, *, transpose: bool, block_rows: int) -> None:
    if block_rows not in (1, BLOCK):
        raise ValueError(f"blocks of {block_rows} rows; there are blocks of 1 and of {BLOCK}")
    if amax.shape != x.shape[: amax.ndim] or amax.ndim + (transpose or block_rows > 1) >= x.ndim:
        raise ValueError(f"amax has shape {amax.shape}; it goes with leading axes of {x.shape}")
    contraction = x.shape[-2 if transpose else -1]
    if contraction % BLOCK:
        raise ValueError(
            f"the contraction axis has {contraction} entries, no multiple of {BLOCK}; pad it with "
            "zeros or leave this product unquantized"
        )


def _words(key: Array | None) -> Array:
    return jnp.zeros(2, jnp.uint32) if key is None else seeds(key)


def _stacked(x: Array) -> Array:
    """With one leading axis."""
    return x.reshape(-1, *x.shape[-2:])


def _repeated(amax: Array, x: Array) -> Array:
    """One for each entry of `_stacked(x)`."""
    return jnp.repeat(amax.reshape(-1), math.prod(x.shape[amax.ndim : -2]))


def _rows(x: Array, amax: Array, words: Array, form: Form, interpret: Any):
    """Blocks along the rows of x [lead, rows, k], which lie one behind the other."""
    lead, _, k = x.shape
    number = x.shape[1] * k // BLOCK
    blocks = at_least(x.reshape(lead, number, BLOCK), 1, GROUP)
    cut = Cut(blocks.shape[1], ROW_GROUPS)

    def body(x, amax, words, codes, scales):
        entry, program = lax.axis_index("lead"), lax.axis_index("programs")
        task = Task(form, amax[entry], words, entry)
        cut.walk(program, lambda start: _row_group(x, codes, scales, task, start, number))

    grid = {"programs": cut.programs, "lead": lead}
    run = kernel(body, outputs((lead, blocks.shape[1])), grid, interpret=interpret)
    codes, scales = run(blocks, amax, words)
    return codes[:, :number], scales[:, :number]


def _row_group(x, codes, scales, task: Task, start: Any, number: int) -> None:
    """The 128 blocks from `start` on, of `number` an entry has."""
    at = (task.entry, pl.ds(start, GROUP))

    def source(_):
        block = load(x.at[*at, :])
        return join(rotate(split(block))) if task.form.hadamard else block

    def noise(_):
        block = unsigned(task.entry * number + start) + numbers()
        return draws(task.words, block * jnp.uint32(BLOCK))

    def write(_, found):
        codes[*at, :] = found

    scales[*at] = encode(Parts(1, source, noise, write), task.amax, task.form)


def _columns(x: Array, amax: Array, words: Array, form: Form, interpret: Any):
    """Blocks along the columns of x [lead, m, k]; codes and scales of its transpose."""
    lead, m, k = x.shape
    x = at_least(x, 2, GROUP)
    columns, blocks = Cut(x.shape[2], 1), Cut(m // BLOCK, COLUMN_BLOCKS, width=1)

    def body(x, amax, words, codes, scales):
        entry, across, down = (lax.axis_index(name) for name in ("lead", "columns", "blocks"))
        task = Task(form, amax[entry], words, entry)

        def step(column):
            blocks.walk(down, lambda i: _column_group(x, codes, scales, task, column, i, k))

        columns.walk(across, step)

    grid = {"columns": columns.programs, "blocks": blocks.programs, "lead": lead}
    run = kernel(body, outputs((lead, x.shape[2], m // BLOCK)), grid, interpret=interpret)
    codes, scales = run(x, amax, words)
    return codes[:, :k].reshape(lead, k, m), scales[:, :k]


def _column_group(x, codes, scales, task: Task, column: Any, block: Any, k: int) -> None:
    """Block number `block` of the 128 columns from `column` on, of `k` an entry has."""
    own = pl.ds(column, GROUP)
    m = scales.shape[2] * BLOCK

    def source(_):
        rows = [load_column(x.at[task.entry, block * BLOCK + i, own]) for i in range(BLOCK)]
        return join(rotate(rows) if task.form.hadamard else rows)

    def noise(_):
        row = unsigned(task.entry * k + column) + numbers()
        return draws(task.words, row * jnp.uint32(m) + unsigned(block * BLOCK))

    def write(_, found):
        codes[task.entry, own, block, :] = found

    scales[task.entry, own, block] = encode(Parts(1, source, noise, write), task.amax, task.form)


def _both(x: Array, amax: Array, words: Array, forms: tuple[Form, Form], interpret: Any):
    """Rows and columns of x [lead, m, k]: a program takes 16 rows, whole or `WIDE` columns of them,
    by rows and then, from the cache, by columns. `amax` and `words` are one behind the other."""
    lead, m, k = x.shape
    part = WIDE if k % WIDE == 0 else k
    rounds, blocks = part // GROUP, k // BLOCK
    turns = -(-rounds // WARPGROUPS)

    def body(flat, x, amax, words, codes, scales, codes_t, scales_t):
        entry, down, piece = (lax.axis_index(name) for name in ("lead", "blocks", "pieces"))
        most = amax[entry], amax[lead + entry]
        pairs = (words[0], words[1]), (words[2], words[3])
        by_row, by_column = (Task(*parts, entry) for parts in zip(forms, most, pairs, strict=True))

        def each(step):
            @pl.loop(0, turns)
            def _turn(i):
                group = i * WARPGROUPS + lax.axis_index("warpgroup")
                pl.when(group < rounds)(lambda: step(group))

        def across(group):  # 128 blocks: of one row, or as they lie in whole rows
            start = down * k + group * GROUP
            if part < k:
                start = (down * BLOCK + group) * blocks + piece * GROUP
            _row_group(flat, codes, scales, by_row, start, m * blocks)

        each(across)
        each(
            lambda i: _column_group(
                x, codes_t, scales_t, by_column, piece * part + i * GROUP, down, k
            )
        )

    out = (*outputs((lead, m * blocks)), *outputs((lead, k, m // BLOCK)))
    grid = {"pieces": k // part, "blocks": m // BLOCK, "lead": lead}
    run = kernel(body, out, grid, warpgroups=WARPGROUPS, interpret=interpret)
    codes, scales, codes_t, scales_t = run(x.reshape(lead, -1, BLOCK), x, amax, words)
    return (codes, scales), (codes_t, scales_t)
