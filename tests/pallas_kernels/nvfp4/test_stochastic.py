"""Stochastic rounding: its mean, its noise, and that it is the same on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.nvfp4 import dequantize, quantize, reference

KEYS = 256


def drawn(x, rule):
    """[keys, *x]"""

    def one(key):
        return dequantize(quantize(x, rule=rule, key=key), jnp.float32)

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), KEYS)), np.float64)


@pytest.mark.parametrize(("rule", "cut"), [("static_4", 0.0), ("static_6", 3.7e-3)])
def test_the_mean_is_the_number(rule, cut):
    """But where rounding the scale down cuts off what is over 6, a sixteenth at most: in a block's
    largest numbers under static_6, nowhere under static_4, which has codes to spare."""
    x = jax.random.normal(jax.random.key(1), (16, 256), jnp.bfloat16)
    found = drawn(x, rule)
    mean, spread = found.mean(0), found.std(0) / np.sqrt(KEYS)
    x = np.asarray(x, np.float64)
    moved = spread > 0
    off = (mean - x)[moved] / spread[moved]
    assert abs(off.mean()) < 5 / np.sqrt(off.size) and np.mean(off**2) < 1.1
    assert np.sum((x - mean) * x) / np.sum(x * x) == pytest.approx(cut, abs=6e-4)


def test_the_search_for_a_scale_prefers_draws_that_err_less():
    """As published, it compares what was rounded: the mean is off, by less than a nearest error."""
    x = jax.random.normal(jax.random.key(1), (16, 256), jnp.bfloat16)
    nearest = np.asarray(dequantize(quantize(x), jnp.float32)) - np.float32(x)
    off = drawn(x, "mse").mean(0) - np.float32(x)
    assert 0.01 < np.sqrt(np.mean(off**2)) < 0.4 * np.sqrt(np.mean(nearest**2))


def test_equals_the_golden_by_its_draws(goldens):
    with np.load(goldens / "rht.npz") as file:
        x = jnp.asarray(file["stochastic_x"])
        for rule, last in (("static_6", 0), ("mse", 1)):
            key = f"stochastic/{rule}"
            draws = tuple(file[f"{key}/draw{i}_rand_like"].reshape(x.shape) for i in (0, last))
            a = jax.jit(lambda x, d, r=rule: reference.quantize(x, rule=r, draws=d))(x, draws)
            codes = np.asarray(a.codes).view(np.uint8)
            np.testing.assert_array_equal(codes[:, ::2] | codes[:, 1::2] << 4, file[f"{key}/codes"])
            bits = np.asarray(a.scales).view(np.uint8)
            np.testing.assert_array_equal(bits, file[f"{key}/scales_e4m3"])


def test_many_devices_round_as_one_does():
    mesh = jax.make_mesh((2, 4), ("rows", "columns"))
    x = jax.random.normal(jax.random.key(1), (32, 128), jnp.bfloat16)
    key = jax.random.key(2)
    want = quantize(x, key=key)
    parts = NamedSharding(mesh, PartitionSpec("rows", "columns"))
    got = jax.jit(lambda x: quantize(x, key=key), in_shardings=parts)(x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
