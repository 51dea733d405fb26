"""Compiles one kernel for one chip and prints what the compiler said, as JSON.

    python tests/pallas_kernels/compile_kernel.py h200 hopper_forward 128

A process of its own: Mosaic takes one chip a process, and settings are read when JAX is imported.
"""

import json
import sys

from tests.pallas_kernels import deviceless

DUMP = deviceless.prepare()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from pallas_kernels.attention.mosaic import (  # noqa: E402
    blackwell_forward,
    hopper_backward,
    hopper_forward,
)
from pallas_kernels.attention.mosaic.columns import MaskColumns  # noqa: E402
from pallas_kernels.attention.tilemap import TileMap  # noqa: E402

BATCH, LENGTH, HEADS, RANGES = 1, 1024, 2, 5


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def tile_map(rows: int) -> TileMap:
    ranges = [array(1, LENGTH // rows, RANGES, dtype=jnp.int32) for _ in range(3)]
    return TileMap(*ranges, array(1, LENGTH // rows, dtype=jnp.int32))


def columns() -> MaskColumns:
    return MaskColumns(array(1, 4, LENGTH, dtype=jnp.int32), array(1, LENGTH, dtype=jnp.int32))


def forward(module, width: int):
    size = module.ForwardTiles()
    x = array(BATCH, LENGTH, HEADS, width)

    def run(q, k, v, columns, tiles):
        return module.forward(q, k, v, columns, tiles, size)

    return run, (x, x, x, columns(), tile_map(size.rows))


def backward(kernel, width: int):
    size = hopper_backward.BackwardTiles()
    x = array(BATCH, LENGTH, HEADS, width)
    row = array(BATCH, HEADS, LENGTH, dtype=jnp.float32)

    def run(*arguments):
        *saved, tiles = arguments
        return kernel(hopper_backward.Saved(*saved), tiles, size)

    return run, (x, x, x, x, row, row, columns(), tile_map(size.rows))


KERNELS = {
    "hopper_forward": lambda width: forward(hopper_forward, width),
    "blackwell_forward": lambda width: forward(blackwell_forward, width),
    "hopper_dq": lambda width: backward(hopper_backward.query_gradient, width),
    "hopper_dkv": lambda width: backward(hopper_backward.key_value_gradient, width),
}

if __name__ == "__main__":
    chip, name, width = sys.argv[1], sys.argv[2], int(sys.argv[3])
    fn, arguments = KERNELS[name](width)
    deviceless.compile_for(chip, fn, *arguments)
    print(json.dumps(deviceless.inspect(DUMP)))
