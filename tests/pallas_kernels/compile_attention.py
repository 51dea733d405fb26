"""Compiles a layer loop's attention and its gradient for a GPU and prints facts on the program.

    python tests/pallas_kernels/compile_attention.py h200 static|traced

The tokens are those of a clip of four chunks, clean and noisy, in the order of Balanced SP over two
devices; their columns are known when tracing, or not. It runs as a separate process, because the
compiler's settings are read when JAX is imported.
"""

import json
import re
import sys

from tests.pallas_kernels import deviceless

deviceless.prepare()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from longlive_jax.parallel.balanced import interleave_shards  # noqa: E402
from longlive_jax.training.objectives.teacher_forcing import full_history_tokens  # noqa: E402
from pallas_kernels.attention import attention  # noqa: E402
from tests.pallas_kernels import hlo  # noqa: E402

CHUNKS, CHUNK_TOKENS, LAYERS, HEADS, WIDTH = 4, 1024, 3, 3, 128


def order(column):
    return interleave_shards(column[:CHUNKS], column[CHUNKS:], 2, axis=0)


def report(chip: str, mode: str) -> dict:
    tokens = full_history_tokens(CHUNKS, CHUNK_TOKENS, order=order)

    def total(qkv, traced):
        def layer(carry, qkv):
            known = tokens if mode == "static" else traced
            return carry + jnp.sum(attention(*qkv, known, known).astype(jnp.float32)), None

        return jax.lax.scan(layer, 0.0, qkv)[0]

    x = jax.ShapeDtypeStruct((LAYERS, 1, len(tokens), HEADS, WIDTH), jnp.bfloat16)
    columns = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tokens)
    program = deviceless.compile_for(chip, jax.value_and_grad(total), (x, x, x), columns)
    text = program.as_text()
    return {
        "tokens": len(tokens),
        "forward": len(re.findall(r'custom_call_target="__cudnn\$fmhaSoftmax"', text)),
        "backward": len(re.findall(r'custom_call_target="__cudnn\$fmhaSoftmaxBackward"', text)),
        "conditionals": len(re.findall(r" conditional\(", text)),
        "largest_array": hlo.largest_array(text),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1], sys.argv[2])))
