"""Ulysses sequence parallelism: sequence-sharded outside attention, head-sharded inside it.

Source: Jacobs et al. 2023, arXiv:2309.14509; paper, section 3.1.
"""

from collections.abc import Callable

import jax
from jax import lax

from longlive_jax.parallel.mesh import SP
from longlive_jax.typing import Array
from pallas_kernels.attention import AttentionFn
from pallas_kernels.tokens import Tokens

type Exchange = Callable[..., Array]
"""`(x, split=axis, concat=axis) -> x`: an all-to-all over the sp axis."""


def exchange(x: Array, *, split: int, concat: int) -> Array:
    """All-to-all over sp: axis `split` becomes sharded, axis `concat` is gathered."""
    return lax.all_to_all(x, SP, split_axis=split, concat_axis=concat, tiled=True)


def ulysses(attend: AttentionFn, *, exchange: Exchange = exchange) -> AttentionFn:
    """Wraps `attend` for use inside `shard_map`.

    `q`, `k`, `v` [b, l, n, d] are a device's shard of the sequence with all heads, and so is the
    result. The tokens describe the full sequence in device order, as `all_gather_tokens` returns
    it (once per step). `attend` gets the full sequence and n / sp heads.
    """

    def sharded(q: Array, k: Array, v: Array, q_tokens: Tokens, k_tokens: Tokens) -> Array:
        q, k, v = (exchange(x, split=2, concat=1) for x in (q, k, v))
        return exchange(attend(q, k, v, q_tokens, k_tokens), split=1, concat=2)

    return sharded


def all_gather_tokens(tokens: Tokens) -> Tokens:
    """The tokens [b, l] of all devices along sp, concatenated in device order."""
    return jax.tree.map(lambda x: lax.all_gather(x, SP, axis=1, tiled=True), tokens)
