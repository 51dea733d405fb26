"""Compiles attention and its gradient for one chip and prints the compilers' report as JSON.

    python tests/pallas_kernels/compile_kernel.py h200 128

It runs as a separate process: Mosaic compiles for one chip per process, and settings are read when
JAX is imported.
"""

import json
import sys

from tests.pallas_kernels import deviceless

DUMP = deviceless.prepare()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from longlive_jax.layout import teacher_forcing  # noqa: E402
from pallas_kernels.attention import attention_with_lse  # noqa: E402

HEADS = 2


def gradients(q, k, v, grad):
    """Output, log-sum-exp and the gradients of all arguments; launches all three kernels."""
    tokens = teacher_forcing(4, 8, 15, chunk_frames=1)

    def attend(q, k, v):
        return attention_with_lse(q, k, v, tokens, tokens, implementation="mosaic")

    (out, lse), pull = jax.vjp(attend, q, k, v)
    return out, lse, pull((grad, lse))


if __name__ == "__main__":
    chip, width = sys.argv[1], int(sys.argv[2])
    x = jax.ShapeDtypeStruct((1, 8 * 8 * 15, HEADS, width), jnp.bfloat16)
    deviceless.compile_for(chip, gradients, x, x, x, x)
    print(json.dumps(deviceless.inspect(DUMP)))
