"""Ulysses: sequence-sharded outside attention, head-sharded inside (Jacobs et al. 2023,
arXiv:2309.14509; paper, section 3.1)."""

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
    """All-to-all over sp: axis `split` is shared out, axis `concat` brought together."""
    return lax.all_to_all(x, SP, split_axis=split, concat_axis=concat, tiled=True)


def ulysses(attend: AttentionFn, *, exchange: Exchange = exchange) -> AttentionFn:
    """Wraps `attend` for use inside `shard_map`.

    `q, k, v` [b, l, n, d] are a device's part of the sequence, with all heads; so is the result.
    The tokens describe the whole sequence, parts in the order of their devices, as `whole` makes
    them once a step. `attend` sees the whole sequence and n / sp heads.
    """

    def sharded(q: Array, k: Array, v: Array, q_tokens: Tokens, k_tokens: Tokens) -> Array:
        q, k, v = (exchange(x, split=2, concat=1) for x in (q, k, v))
        return exchange(attend(q, k, v, q_tokens, k_tokens), split=1, concat=2)

    return sharded


def whole(tokens: Tokens) -> Tokens:
    """Tokens [b, l] of every device along sp, one after the other."""
    return jax.tree.map(lambda x: lax.all_gather(x, SP, axis=1, tiled=True), tokens)
