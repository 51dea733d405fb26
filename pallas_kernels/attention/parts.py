"""Attention to several sets of keys, one call for each, merged by their log-sum-exp.

The sets stay where they are; attention to one sequence of keys would concatenate them first.
"""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.api import AttentionFn, attention, attention_with_lse
from pallas_kernels.tokens import Tokens

__all__ = ["Part", "attend_parts", "merge", "with_lse"]

Part = tuple[Array, Array, Tokens | None, Tokens | None]
"""Keys and values `[b, k, n, d]`, and the tokens of the queries and of these keys, or None twice if
all queries see all of them."""


def with_lse(attend: AttentionFn) -> Callable[..., tuple[Array, Array]] | None:
    """The form of `attend` that also returns the log-sum-exp; None if it is not known.

    It is known of `attention` and of a `functools.partial` of it.
    """
    if attend is attention:
        return attention_with_lse
    if isinstance(attend, functools.partial) and attend.func is attention:
        return functools.partial(attention_with_lse, *attend.args, **attend.keywords)
    return None


def attend_parts(
    attend: Callable[..., tuple[Array, Array]], q: Float[Array, "b q n d"], parts: Sequence[Part]
) -> Float[Array, "b q n d"]:
    """Attention to the keys of all parts together; `attend` is as `attention_with_lse`."""
    return merge([attend(q, *part) for part in parts])


def merge(
    results: Sequence[tuple[Float[Array, "b q n d"], Float[Array, "b q n"]]],
) -> Float[Array, "b q n d"]:
    """Attention to disjoint sets of keys together, from that to each set and its log-sum-exp.

    A set without visible keys has a log-sum-exp of -inf and takes no part. Queries that see no key
    at all give zeros.
    """
    outputs, sums = zip(*results, strict=True)
    lse = jnp.stack(sums)
    top = lse.max(0)
    weights = jnp.exp(lse - jnp.where(jnp.isfinite(top), top, 0.0))
    weights = weights / jnp.maximum(weights.sum(0), 1e-30)
    out = sum(w[..., None] * x.astype(jnp.float32) for w, x in zip(weights, outputs, strict=True))
    return out.astype(outputs[0].dtype)
