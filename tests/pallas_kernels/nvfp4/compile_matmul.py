"""Compiles the NVFP4 product for one chip and prints the compilers' report as JSON.

    python tests/pallas_kernels/nvfp4/compile_matmul.py gb200 catalog|shapes

It runs as a separate process: Mosaic compiles for one chip per process, and settings are read when
JAX is imported.
"""

import json
import sys

from tests.pallas_kernels import deviceless

DUMP = deviceless.prepare()

import jax.numpy as jnp  # noqa: E402

from pallas_kernels.catalog import kernels_of  # noqa: E402
from pallas_kernels.nvfp4.mosaic.records import build_product  # noqa: E402

SHAPES = {
    "a frame": build_product(880, 3072, 3072),
    "most tokens": build_product(84480, 14336, 3072, collective=False),
    "float32": build_product(7040, 3072, 14336, out_dtype=jnp.float32),
    "rank 128": build_product(7040, 3072, 3072, rank=128),
    "rank 16, single blocks": build_product(7040, 3072, 3072, rank=16, collective=False),
}


def compiled(build) -> dict:
    """The report on the only kernel of `build()`."""
    run, arguments = build()
    deviceless.compile_for(sys.argv[1], run, *arguments)
    (kernel,) = deviceless.inspect(DUMP, "UTC[A-Z]*MMA")
    for file in DUMP.iterdir():
        file.unlink()
    return kernel


if __name__ == "__main__":
    named = {kernel.name: kernel.build for kernel in kernels_of("matmul")}
    chosen = named if sys.argv[2] == "catalog" else SHAPES
    print(json.dumps({name: compiled(build) for name, build in chosen.items()}))
