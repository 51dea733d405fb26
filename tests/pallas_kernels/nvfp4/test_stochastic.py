"""Stochastic rounding: its mean, its noise, and the same results on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.nvfp4 import dequantize, quantize, reference

KEYS = 256


def rounded(x, rule, stochastic):
    """x rounded with each of the keys: [keys, *x]."""

    @jax.jit
    @jax.vmap
    def run(key):
        return dequantize(quantize(x, rule=rule, key=key, stochastic=stochastic), jnp.float32)

    return np.asarray(run(jax.random.split(jax.random.key(0), KEYS)), np.float64)


@pytest.mark.parametrize(("rule", "cut"), [("static_4", 0.0), ("static_6", 3.7e-3)])
def test_the_published_way_cuts_values_that_clip(rule, cut):
    """Only values that clip have a bias, of a sixteenth at most, where the scale was rounded down:
    a block's largest values with static_6, none with static_4, which has spare codes."""
    x = jax.random.normal(jax.random.key(1), (16, 256), jnp.bfloat16)
    samples = rounded(x, rule, "reference")
    mean, spread = samples.mean(0), samples.std(0) / np.sqrt(KEYS)
    x = np.asarray(x, np.float64)
    moved = spread > 0
    off = (mean - x)[moved] / spread[moved]
    assert abs(off.mean()) < 5 / np.sqrt(off.size) and np.mean(off**2) < 1.1
    assert np.sum((x - mean) * x) / np.sum(x * x) == pytest.approx(cut, abs=6e-4)


@pytest.mark.parametrize("rule", ["static_4", "static_6", "mse"])
def test_the_mean_is_the_value(rule):
    x = jax.random.normal(jax.random.key(1), (16, 256), jnp.bfloat16)
    samples = rounded(x, rule, "unbiased")
    mean, spread = samples.mean(0), samples.std(0) / np.sqrt(KEYS)
    x = np.asarray(x, np.float64)
    moved = spread > 0
    off = (mean - x)[moved] / spread[moved]
    assert abs(off.mean()) < 5 / np.sqrt(off.size) and np.mean(off**2) < 1.1
    assert np.sum((x - mean) * x) / np.sum(x * x) == pytest.approx(0, abs=6e-4)


def test_the_published_search_for_a_scale_prefers_noise_that_errs_less():
    """It compares rounded values: there is a bias, below the error of nearest."""
    x = jax.random.normal(jax.random.key(1), (16, 256), jnp.bfloat16)
    nearest = np.asarray(dequantize(quantize(x), jnp.float32)) - np.float32(x)
    off = rounded(x, "mse", "reference").mean(0) - np.float32(x)
    assert 0.01 < np.sqrt(np.mean(off**2)) < 0.4 * np.sqrt(np.mean(nearest**2))


def test_equals_the_golden_with_its_noise(goldens):
    with np.load(goldens / "rht.npz") as file:
        x = jnp.asarray(file["stochastic_x"])
        for rule, last in (("static_6", 0), ("mse", 1)):
            key = f"stochastic/{rule}"
            noise = tuple(file[f"{key}/draw{i}_rand_like"].reshape(x.shape) for i in (0, last))
            a = jax.jit(
                lambda x, n, r=rule: reference.quantize(x, rule=r, noise=n, stochastic="reference")
            )(x, noise)
            codes = np.asarray(a.codes).view(np.uint8)
            np.testing.assert_array_equal(codes[:, ::2] | codes[:, 1::2] << 4, file[f"{key}/codes"])
            bits = np.asarray(a.scales).view(np.uint8)
            np.testing.assert_array_equal(bits, file[f"{key}/scales_e4m3"])


def test_sharded_arrays_round_as_on_one_device():
    mesh = jax.make_mesh((2, 4), ("rows", "columns"))
    x = jax.random.normal(jax.random.key(1), (32, 128), jnp.bfloat16)
    key = jax.random.key(2)
    want = quantize(x, key=key)
    sharding = NamedSharding(mesh, PartitionSpec("rows", "columns"))
    got = jax.jit(lambda x: quantize(x, key=key), in_shardings=sharding)(x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
