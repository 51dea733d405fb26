"""Unbiased stochastic rounding: the mean over keys is the value, for every rule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nvfp4 import RULES
from pallas_kernels.nvfp4.simulated import simulate

LIMIT = 3e-3
"""Largest bias, as a share of the signal's root mean square."""


@functools.partial(jax.jit, static_argnames=("rule", "stochastic", "draws"))
def halves(x, rule, stochastic, draws):
    """The mean error of two independent halves of all draws."""

    def mean(half):
        def add(i, total):
            key = jax.random.fold_in(jax.random.key(half), i)
            return total + (simulate(x, rule=rule, key=key, stochastic=stochastic).values - x)

        return jax.lax.fori_loop(0, draws, add, jnp.zeros_like(x)) / draws

    return mean(0), mean(1)


def bias(x, rule, stochastic, draws):
    """The root mean square of E[rounded] - x over that of x.

    The noise of the two halves is independent, so the mean of their product has no noise floor:
    its expectation is the squared bias.
    """
    first, second = (np.asarray(half, np.float64) for half in halves(x, rule, stochastic, draws))
    squared = np.mean(first * second) / np.mean(np.asarray(x, np.float64) ** 2)
    return np.sqrt(max(squared, 0.0))


def values(power):
    x = jax.random.normal(jax.random.key(0), (128, 512))
    return x**power


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("power", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_bias_is_below_its_limit(rule, power):
    assert bias(values(power), rule, "unbiased", draws=48) < LIMIT


@pytest.mark.parametrize(("rule", "least"), [("mse", 0.015), ("static_6", 0.008)])
def test_the_test_resolves_the_bias_of_the_published_way(rule, least):
    assert least < bias(values(1), rule, "reference", draws=48) < 0.03


@pytest.mark.parametrize("rule", RULES)
def test_no_value_saturates(rule):
    """The largest magnitude of every block is kept in the mean."""
    x = values(1)
    first, second = halves(x, rule, "unbiased", 48)
    blocks = np.abs(np.asarray(x)).reshape(128, -1, 16)
    top = blocks == blocks.max(-1, keepdims=True)
    error = np.asarray((first + second) / 2).reshape(blocks.shape)[top]
    signed = error * np.sign(np.asarray(x)).reshape(blocks.shape)[top]
    assert abs(np.mean(signed)) / np.mean(blocks[top]) < LIMIT
