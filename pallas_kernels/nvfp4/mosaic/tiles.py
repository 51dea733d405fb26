"""Quantization in squares of 16x16 on Blackwell: those of weights, which serve W and W^T alike.

A thread holds a whole square, as 16 blocks; 128 threads those of 16 rows and 2048 columns.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.nvfp4.format import BLOCK
from pallas_kernels.nvfp4.mosaic.blocks import (
    GROUP,
    Form,
    Parts,
    draws,
    encode,
    load,
    numbers,
    unsigned,
)
from pallas_kernels.nvfp4.mosaic.launch import Cut, Task, at_least, kernel, outputs


def quantize(
    x: Array, amax: Array, words: Array, form: Form, transpose: bool, interpret: Any
) -> tuple[Array, Array]:
    """Codes and scales of x [lead, m, k] or of its transpose, every scale 16 times.

    `amax` is one for every entry. Raises `Unsupported` for a rotated x:
    what is rotated is no weight, and has blocks of 1x16.
    """
    if form.hadamard:
        raise Unsupported("rotated NVFP4 squares have no kernel; use implementation='xla'")
    m, k = x.shape[1:]
    x = at_least(at_least(x, 1, -(-m // BLOCK) * BLOCK), 2, -(-k // BLOCK) * BLOCK)
    codes, scales = _quantize(
        at_least(x, 2, GROUP * BLOCK), amax, words, form, transpose, (m, k), interpret
    )
    scales = scales[:, :, : x.shape[2] // BLOCK]
    codes = codes.reshape(*codes.shape[:2], -1)
    if transpose:
        return jnp.swapaxes(codes[:, :m, :k], 1, 2), _sixteen(jnp.swapaxes(scales, 1, 2), k)
    return codes[:, :m, :k], _sixteen(scales, m)


def _sixteen(scales: Array, rows: int) -> Array:
    return jnp.repeat(scales, BLOCK, axis=1)[:, :rows]


def _quantize(x, amax, words, form: Form, transpose: bool, size, interpret):
    """Codes in blocks [lead, m, k / 16, 16], scales [lead, m / 16, k / 16]."""
    lead, m, k = x.shape
    cut = Cut(k // BLOCK, 1)

    def body(x, amax, words, codes, scales):
        entry, down, program = (lax.axis_index(name) for name in ("lead", "rows", "programs"))
        task = Task(form, amax[entry], words, entry)
        cut.walk(program, lambda at: _group(x, codes, scales, task, down, at, transpose, size))

    codes, _ = outputs((lead, m, k // BLOCK))
    _, scales = outputs((lead, m // BLOCK, k // BLOCK))
    grid = {"programs": cut.programs, "rows": m // BLOCK, "lead": lead}
    run = kernel(body, (codes, scales), grid, interpret=interpret)
    return run(x.reshape(lead, m, -1, BLOCK), amax, words)


def _group(x, codes, scales, task: Task, down: Any, at: Any, transpose: bool, size) -> None:
    """The 128 squares from number `at` on of row `down` of squares; `size` is x without padding."""
    own = pl.ds(at, GROUP)
    m, k = size

    def source(i):
        return load(x.at[task.entry, down * BLOCK + i, own, :])

    def noise(i):
        row, first = unsigned(down * BLOCK + i), (unsigned(at) + numbers()) * jnp.uint32(BLOCK)
        entry = unsigned(task.entry)
        if transpose:
            return draws(task.words, (entry * jnp.uint32(k) + first) * jnp.uint32(m) + row, m)
        return draws(task.words, (entry * jnp.uint32(m) + row) * jnp.uint32(k) + first)

    def write(i, found):
        codes[task.entry, down * BLOCK + i, own, :] = found

    parts = Parts(BLOCK, source, noise, write)
    scales[task.entry, down, own] = encode(parts, task.amax, task.form)
