"""Attention to several sets of keys, merged by their log-sum-exp, against one sequence of keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention, attention_with_lse
from pallas_kernels.attention.parts import attend_parts, merge, with_lse
from pallas_kernels.tokens import EMPTY, concat, make

LENGTH, SLOTS = 6, 3


def normal(seed, length):
    return jax.random.normal(jax.random.key(seed), (2, length, 2, 8))


def tokens(chunk, *, noisy=False):
    chunk = jnp.repeat(jnp.asarray(chunk, jnp.int32), LENGTH, axis=-1)
    pos = jnp.zeros((*chunk.shape, 3), jnp.int32)
    return make(pos, chunk, noisy, uniform_mask=noisy, leading=True)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize(
    "slots",
    [[[0, 1, 2]] * 2, [[0, 1, EMPTY], [0, EMPTY, EMPTY]], [[EMPTY] * 3] * 2],
    ids=["full", "uneven", "no past"],
)
def test_parts_equal_one_sequence(slots, implementation):
    q, k, v = (normal(seed, LENGTH) for seed in range(3))
    past_k, past_v = (normal(seed, SLOTS * LENGTH) for seed in (3, 4))
    own, past = tokens([[5], [5]], noisy=True), tokens(slots)
    run = with_lse(functools.partial(attention, implementation=implementation))
    assert run is not None
    got = attend_parts(run, q, [(k, v, None, None), (past_k, past_v, own, past)])
    joined = (jnp.concatenate(pair, axis=1) for pair in ((k, past_k), (v, past_v)))
    want = attention(q, *joined, own, concat(own, past), implementation="reference")
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_two_sets_are_weighted_by_the_sigmoid_of_their_log_sums():
    first, second = normal(0, 5), normal(1, 5)
    a, b = normal(2, 5)[..., 0], normal(3, 5)[..., 0]
    weight = jax.nn.sigmoid(a - b)[..., None]
    want = weight * first + (1 - weight) * second
    np.testing.assert_allclose(merge([(first, a), (second, b)]), want, atol=1e-6)


def test_sums_are_float32():
    """Results in bfloat16 are rounded once, after their weighted sum."""
    first, second = (normal(seed, 5).astype(jnp.bfloat16) for seed in (0, 1))
    a, b = normal(2, 5)[..., 0], normal(3, 5)[..., 0]
    got = merge([(first, a), (second, b)])
    weight = np.asarray(jax.nn.sigmoid(a - b), np.float64)[..., None]
    exact = weight * np.asarray(first, np.float64) + (1 - weight) * np.asarray(second, np.float64)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2**-8, atol=1e-6)


def test_keys_that_nobody_sees_do_not_matter():
    """Neither do infinite logits of a set that takes no part, and no set at all gives zeros."""
    out, lse = attention_with_lse(normal(0, 4), normal(1, 4), normal(2, 4))
    nothing = jnp.full_like(lse, -jnp.inf)
    np.testing.assert_array_equal(merge([(out, lse), (jnp.ones_like(out), nothing)]), out)
    np.testing.assert_array_equal(merge([(out, nothing), (out, nothing)]), jnp.zeros_like(out))
    large = merge([(out, lse + 1e4), (2 * out, lse + 1e4)])
    np.testing.assert_allclose(large, 1.5 * out, rtol=1e-6)


def test_log_sums_are_known_of_attention_only():
    assert with_lse(attention) is attention_with_lse
    assert with_lse(lambda *arguments: attention(*arguments)) is None
