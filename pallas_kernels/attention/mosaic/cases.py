"""Inputs on which the attention kernels are tested, and those of the 5B model's sizes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.mosaic.targets import BLACKWELL, Target
from pallas_kernels.kernel import Case
from pallas_kernels.nvfp4.format import NVFP4
from pallas_kernels.nvfp4.reference import quantize
from pallas_kernels.tokens import EMPTY, Tokens, concat, make

SLOT = BLACKWELL.forward_tiles.keys
"""Tokens of a slot of a packed cache in the cases: one tile."""
CHUNK, HEADS, WIDTH, PAST = 7040, 24, 128, 3
"""Tokens of a chunk, heads and head width of the 5B model, and past chunks that it attends to."""


def tokens(length: int, chunk=0, noisy=False) -> Tokens:
    """Tokens of one sample, without positions."""
    return make(np.zeros((length, 3), np.int32), chunk, noisy)


def masked_cases(target: Target) -> tuple[Case, ...]:
    """Cases with the arguments (q, k, v, query tokens, key tokens)."""
    return _cases(_operands, target, quick=("one row",))


def gradient_cases(target: Target) -> tuple[Case, ...]:
    """`masked_cases` with the gradients of both results before the tokens.

    They launch the forward kernel on the same masks, so few of its own cases are quick ones.
    """
    quick = ("no keys", "blind query tile", "three tiles", "NaN in unseen keys and values")
    return _cases(_with_gradients, target, (*quick, "NaN in blind queries and their gradients"))


def _cases(operands: Callable, target: Target, quick: tuple[str, ...]) -> tuple[Case, ...]:
    return tuple(
        Case(name, functools.partial(operands, *mask(target), **options), name not in quick)
        for name, mask, options in _masks()
    )


def _masks() -> tuple[tuple[str, Callable[[Target], tuple[Tokens, Tokens]], dict], ...]:
    """(name, function of the target giving query and key tokens, options of `_operands`)."""

    def some(target: Target) -> tuple[Tokens, Tokens]:
        return tokens(40), tokens(70, np.where(np.arange(70) < 50, 0, EMPTY))

    return (
        ("no keys", lambda t: (tokens(40), tokens(64, EMPTY)), {}),
        ("blind query tile", _blind_tile, {}),
        ("one tile", lambda t: (tokens(t.rows), tokens(t.forward_tiles.keys)), {}),
        ("one row", lambda t: (tokens(1), tokens(1)), {}),
        ("three tiles", lambda t: (tokens(2 * t.rows + 3), tokens(t.rows + 1)), {}),
        ("rows of a tile start at different keys", _staggered, {}),
        ("NaN in unseen keys", some, {"unseen_k": True}),
        ("NaN in unseen values", some, {"unseen_v": True}),
        ("NaN in unseen keys and values", some, {"unseen_k": True, "unseen_v": True}),
        ("NaN in blind queries and their gradients", _blind_rows, {"blind_q": True}),
        ("large logits", lambda t: (tokens(40), tokens(70)), {"scale": 300.0}),
        ("largest logits", lambda t: (tokens(40), tokens(70)), {"scale": 1e4}),
    )


def _blind_tile(target: Target) -> tuple[Tokens, Tokens]:
    """A tile of queries that see 64 keys, then a tile of padding."""
    return tokens(2 * target.rows, np.repeat([0, EMPTY], target.rows)), tokens(64)


def _blind_rows(target: Target) -> tuple[Tokens, Tokens]:
    """Padding within a tile."""
    return tokens(40, np.where(np.arange(40) < 30, 0, EMPTY)), tokens(64)


def _staggered(target: Target) -> tuple[Tokens, Tokens]:
    """Every other query sees only the second tile of keys."""
    keys = target.rows
    return tokens(40, np.arange(40) % 2), tokens(2 * keys, np.repeat([1, 0], keys))


def _operands(
    q_tokens: Tokens,
    k_tokens: Tokens,
    *,
    scale: float = 1.0,
    unseen_k: bool = False,
    unseen_v: bool = False,
    blind_q: bool = False,
) -> tuple:
    """Random operands of one head; `scale` multiplies queries and keys."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (1, len(t), 1, 64))
        for key, t in zip(keys, (q_tokens, k_tokens, k_tokens), strict=True)
    )
    empty_q, empty_k = (
        (np.asarray(t.chunk_index) == EMPTY)[None, :, None, None] for t in (q_tokens, k_tokens)
    )
    q = jnp.where(empty_q & blind_q, jnp.nan, scale * q)
    k = jnp.where(empty_k & unseen_k, jnp.nan, scale * k)
    v = jnp.where(empty_k & unseen_v, jnp.nan, v)
    return *(x.astype(jnp.bfloat16) for x in (q, k, v)), q_tokens, k_tokens


def _with_gradients(q_tokens: Tokens, k_tokens: Tokens, **options) -> tuple:
    q, k, v, *rest = _operands(q_tokens, k_tokens, **options)
    grad, d_lse = _random_gradients(q.shape)
    lost = jnp.isnan(q[..., 0])
    return (
        q,
        k,
        v,
        jnp.where(lost[..., None], jnp.nan, grad),
        jnp.where(lost, jnp.nan, d_lse),
        *rest,
    )


def _random_gradients(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    first, second = jax.random.split(jax.random.key(1))
    grad = jax.random.normal(first, shape).astype(jnp.bfloat16)
    return grad, jax.random.normal(second, shape[:-1])


def packed_cases() -> tuple[Case, ...]:
    """Cases with the arguments of `packed_op.attend`."""
    rows = BLACKWELL.rows
    chunk = np.repeat([1, EMPTY], rows)
    cases: dict[str, dict[str, Any]] = {
        "no past keys": {"past": (EMPTY,)},
        "no keys": {"queries": EMPTY, "past": (EMPTY,)},
        "blind query tile": {"own": 2 * rows, "queries": chunk, "past": (0,)},
        "one tile": {"own": rows, "past": (0,)},
        "one row": {"own": 1, "past": (0,)},
        "two slots, an offset": {"past": (0, 1), "offset": True},
        "NaN in an unseen slot": {"past": (0, EMPTY), "broken": True},
        "large logits": {"past": (0,), "scale": 300.0},
    }
    quick = ("no past keys", "two slots, an offset", "NaN in an unseen slot")
    return tuple(
        Case(name, functools.partial(_packed, **options), name not in quick)
        for name, options in cases.items()
    )


def _packed(
    past: tuple[int, ...],
    *,
    own: int = 40,
    queries=2,
    offset: bool = False,
    broken: bool = False,
    scale: float = 1.0,
) -> tuple:
    """Operands of one head with a slot of one tile per entry of `past`, its chunk."""
    keys = jax.random.split(jax.random.key(2), 6)
    q, k, v = (jax.random.normal(key, (1, own, 1, 64)) for key in keys[:3])
    slots = [jax.random.normal(key, (1, len(past), SLOT, 1, 64)) for key in keys[3:5]]
    cache = [quantize(x, lead=2) for x in slots]
    if broken:
        lost = np.asarray(past)[None] == EMPTY
        cache = [NVFP4(x.codes, x.scales, jnp.where(lost, jnp.nan, x.amax), x.rule) for x in cache]
    own_tokens = make(np.zeros((own, 3), np.int32), queries, True)
    k_tokens = concat(own_tokens, tokens(len(past) * SLOT, np.repeat(past, SLOT)))
    shift = jax.random.normal(keys[5], (1, len(past), 1, 1, 64)) if offset else None
    operands = (x.astype(jnp.bfloat16) for x in (scale * q, scale * k, v))
    return *operands, *cache, own_tokens, k_tokens, shift


def production() -> tuple:
    """A chunk of the 5B model that attends to itself and to three past chunks."""
    keys = jax.random.split(jax.random.key(0), 3)
    lengths = CHUNK, (1 + PAST) * CHUNK, (1 + PAST) * CHUNK
    operands = (
        jax.random.normal(key, (1, length, HEADS, WIDTH), jnp.bfloat16)
        for key, length in zip(keys, lengths, strict=True)
    )
    past = tokens(PAST * CHUNK, np.repeat(np.arange(PAST), CHUNK))
    own = tokens(CHUNK, PAST, True)
    return *operands, own, concat(own, past)


def training_production() -> tuple:
    """Teacher forcing of two chunks of the 5B model: clean chunks, then noisy ones."""
    length = 4 * CHUNK
    columns = tokens(length, np.repeat([0, 1, 0, 1], CHUNK), np.arange(length) >= 2 * CHUNK)
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (1, length, HEADS, WIDTH)
    operands = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
    return *operands, *_random_gradients(shape), columns, columns


def packed_production() -> tuple:
    """`production` with packed past chunks and the offsets of their keys."""
    q, k, v, own, every = production()
    shape = (1, PAST, CHUNK, HEADS, WIDTH)
    pack = jax.jit(functools.partial(quantize, lead=2))
    past = [pack(x[:, CHUNK:].reshape(shape)) for x in (k, v)]
    offset = jax.random.normal(jax.random.key(3), (1, PAST, 1, HEADS, WIDTH), jnp.bfloat16)
    return q, k[:, :CHUNK], v[:, :CHUNK], *past, own, every, offset
