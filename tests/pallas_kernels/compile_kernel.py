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
from longlive_jax.planning.sass import Program  # noqa: E402
from pallas_kernels.attention import attention_with_lse  # noqa: E402

HEADS = 2


def gradients(q, k, v, grad):
    """Output, log-sum-exp and the gradients of all arguments; launches all three kernels."""
    tokens = teacher_forcing(4, 8, 15, chunk_frames=1)

    def attend(q, k, v):
        return attention_with_lse(q, k, v, tokens, tokens, implementation="mosaic")

    (out, lse), pull = jax.vjp(attend, q, k, v)
    return out, lse, pull((grad, lse))


def overlap(kernel: str) -> dict[str, object]:
    """How a kernel's machine code runs softmax and products on Hopper.

    beside_products: exponentials of a thread in a step while the step's products are in flight.
    serialized: whether ptxas reports that it runs products one at a time.
    """
    program = Program((DUMP / f"{kernel}.sass_ctrl").read_text(errors="replace"))
    steps = (role.step for role in program.roles if role.step is not None)
    step = max(steps, key=lambda step: step.weight)
    groups = beside = 0
    for x in step.instructions:
        if x.opcode.startswith("HGMMA") and x.operands.endswith("gsb0"):
            groups += 1
        elif x.opcode.startswith("WARPGROUP.DEPBAR"):
            groups = min(groups, int(x.operands.rpartition(", ")[2], 16))
        elif x.opcode.startswith("MUFU.EX2"):
            beside += groups > 0
    log = (DUMP / f"{kernel}.ptxas").read_text(errors="replace")
    return {"beside_products": beside, "serialized": "are serialized" in log}


if __name__ == "__main__":
    chip, width = sys.argv[1], int(sys.argv[2])
    x = jax.ShapeDtypeStruct((1, 8 * 8 * 15, HEADS, width), jnp.bfloat16)
    deviceless.compile_for(chip, gradients, x, x, x, x)
    kernels = deviceless.inspect(DUMP)
    if chip == "h200":
        kernels = [kernel | overlap(kernel["kernel"]) for kernel in kernels]
    print(json.dumps(kernels))
