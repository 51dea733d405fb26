"""attend_chunks against the dense oracle, on windows that differ between samples."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.layout import windows
from pallas_kernels.attention import attention
from pallas_kernels.attention.chunks import attend_chunks
from pallas_kernels.tokens import EMPTY, make

SIZE, WINDOW = 6, 4


def sequence_tokens():
    """Two samples of nine clean and nine noisy chunks, with different cuts and one empty chunk."""
    cuts = np.zeros((2, 9), bool)
    cuts[0, [3]] = cuts[1, [2, 6]] = True
    window_start, sink = windows(jnp.asarray(cuts), window=WINDOW, global_sinks=1)
    chunk = np.tile(np.arange(9), (2, 1))
    chunk[1, 4] = EMPTY
    both = [np.concatenate([np.asarray(x)] * 2, axis=1) for x in (chunk, window_start, sink)]
    columns = [np.repeat(x, SIZE, axis=1) for x in both]
    pos = np.zeros((*columns[0].shape, 3), np.int32)
    noisy = np.arange(columns[0].shape[1]) >= 9 * SIZE
    return make(pos, columns[0], noisy, window_start=columns[1], sink=columns[2], global_sinks=1)


def test_values_and_gradients_equal_the_oracle():
    tokens = sequence_tokens()
    shape = (2, len(tokens), 2, 8)
    q, k, v, g = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 4))
    fast = functools.partial(attend_chunks, size=SIZE, most=WINDOW)
    slow = functools.partial(attention, implementation="reference")

    def value_and_grads(attend):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, tokens, tokens), q, k, v)
        return out, pull(g)

    # The empty chunk attends to others, although it is masked itself; all rows are compared.
    chex.assert_trees_all_close(
        jax.jit(value_and_grads, static_argnums=0)(fast),
        jax.jit(value_and_grads, static_argnums=0)(slow),
        rtol=2e-5,
        atol=2e-5,
    )
