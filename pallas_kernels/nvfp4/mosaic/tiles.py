"""Quantization of weights in 16x16 squares on Blackwell, so that W and W^T have the same blocks.

A thread holds a square as 16 blocks; 128 threads cover 16 rows and 2048 columns.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.nvfp4.format import BLOCK
from pallas_kernels.nvfp4.mosaic.blocks import (
    CONSECUTIVE,
    GROUP,
    BlockGroups,
    QuantizeOptions,
    as_uint32,
    centred_noise,
    encode_groups,
    store,
)
from pallas_kernels.nvfp4.mosaic.launch import ProgramArgs, WorkPartition, kernel, outputs, pad_to


def quantize(
    x: Array,
    amax: Array,
    words: Array,
    options: QuantizeOptions,
    *,
    transpose: bool,
    interpret: Any,
) -> tuple[Array, Array]:
    """Codes and scales of x [lead, m, k] or of its transpose, with every scale repeated 16 times.

    `amax` has one value per entry of the leading axis. Raises `Unsupported` for a rotated x: only
    weights are quantized in squares, and weights are not rotated.
    """
    if options.hadamard:
        raise Unsupported("rotated NVFP4 squares have no kernel; use implementation='xla'")
    m, k = x.shape[1:]
    x = pad_to(pad_to(x, 1, -(-m // BLOCK) * BLOCK), 2, -(-k // BLOCK) * BLOCK)
    codes, scales = _quantize(
        pad_to(x, 2, GROUP * BLOCK), amax, words, options, transpose, (m, k), interpret
    )
    scales = scales[:, :, : x.shape[2] // BLOCK]
    codes = codes.reshape(*codes.shape[:2], -1)
    if transpose:
        return jnp.swapaxes(codes[:, :m, :k], 1, 2), _repeat_rows(jnp.swapaxes(scales, 1, 2), k)
    return codes[:, :m, :k], _repeat_rows(scales, m)


def _repeat_rows(scales: Array, rows: int) -> Array:
    return jnp.repeat(scales, BLOCK, axis=1)[:, :rows]


def _quantize(x, amax, words, options: QuantizeOptions, transpose: bool, size, interpret):
    """Returns codes in blocks [lead, m, k / 16, 16] and scales [lead, m / 16, k / 16]."""
    lead, m, k = x.shape
    partition = WorkPartition(k // BLOCK, 1)

    def body(x, amax, words, codes, scales):
        entry, down, program = (lax.axis_index(name) for name in ("lead", "rows", "programs"))
        args = ProgramArgs(options, amax[entry], words, entry)
        partition.walk(
            program, lambda at: _group(x, codes, scales, args, down, at, transpose, size)
        )

    codes, _ = outputs((lead, m, k // BLOCK))
    _, scales = outputs((lead, m // BLOCK, k // BLOCK))
    grid = {"programs": partition.programs, "rows": m // BLOCK, "lead": lead}
    run = kernel(body, (codes, scales), grid, interpret=interpret)
    return run(x.reshape(lead, m, -1, BLOCK), amax, words)


def _group(x, codes, scales, args: ProgramArgs, down: Any, at: Any, transpose: bool, size) -> None:
    """Quantizes 128 squares from index `at` in the row of squares `down`.

    `size` is (m, k) of x without padding.
    """
    own = pl.ds(at, GROUP)
    m, k = size

    def source(i):
        return CONSECUTIVE.load(x.at[args.entry, down * BLOCK + i, own, :])

    def noise(i):
        row, first = (
            as_uint32(down * BLOCK + i),
            (as_uint32(at) + CONSECUTIVE.index()) * jnp.uint32(BLOCK),
        )
        entry = as_uint32(args.entry)
        if transpose:
            first = (entry * jnp.uint32(k) + first) * jnp.uint32(m) + row
            return centred_noise(CONSECUTIVE, args.words, first, m)
        first = (entry * jnp.uint32(m) + row) * jnp.uint32(k) + first
        return centred_noise(CONSECUTIVE, args.words, first)

    def write(i, block_codes):
        store(codes.at[args.entry, down * BLOCK + i, own, :], block_codes)

    groups = BlockGroups(CONSECUTIVE, BLOCK, source, noise, write)
    store(scales.at[args.entry, down, own], encode_groups(groups, args.amax, args.options))
