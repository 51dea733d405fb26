"""Simulated NVFP4: the values of the reference, computed without packing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nvfp4 import format as fmt
from pallas_kernels.nvfp4 import quantize, rotate
from pallas_kernels.nvfp4.hadamard import rotate_rows
from pallas_kernels.nvfp4.reference import sum_in_pytorch_order
from pallas_kernels.nvfp4.rounding import stochastic_round, to_nearest
from pallas_kernels.nvfp4.simulated import (
    contract,
    from_packed,
    simulate,
    to_code,
    to_scale,
)


def blocks() -> jax.Array:
    """Blocks of many magnitudes, one of zeros and some with tiny scales."""
    x = jax.random.normal(jax.random.key(0), (64, 48))
    sizes = jnp.exp(3 * jax.random.normal(jax.random.key(1), (4, 1, 3, 1)))
    x = (x.reshape(4, 16, 3, 16) * sizes).reshape(64, 48)
    return x.at[:16, :16].set(0).at[16:32, 16:32].multiply(1e-7).astype(jnp.bfloat16)


@pytest.mark.parametrize(
    ("rule", "axis", "stochastic"),
    [("mse", 1, False), ("mse", 0, True), ("static_6", 1, True), ("mae", 0, False),
     ("abs_max", 1, False)],
)  # fmt: skip
def test_values_equal_the_reference(rule, axis, stochastic):
    key = jax.random.key(7) if stochastic else None
    packed = jax.jit(
        functools.partial(quantize, rule=rule, transpose=not axis, implementation="reference")
    )(blocks(), key=key)
    got, want = simulate(blocks(), rule=rule, key=key, axis=axis), from_packed(packed)
    assert got.scaled_codes.dtype == jnp.bfloat16
    wanted = want.scaled_codes if axis else want.scaled_codes.T
    np.testing.assert_array_equal(np.asarray(got.scaled_codes, "f4"), np.asarray(wanted, "f4"))
    assert got.amax == want.amax
    wanted = fmt.dequantize_reference(packed)
    np.testing.assert_array_equal(got.values, wanted if axis else wanted.T)


def test_errors_are_summed_in_the_order_of_the_reference():
    rows = jax.random.uniform(jax.random.key(0), (8, 1, 3, 16))
    halves = rows[..., :8] + rows[..., 8:]
    total = functools.reduce(jnp.add, [halves[..., i : i + 1] for i in range(8)])
    np.testing.assert_array_equal(sum_in_pytorch_order(rows), total)


def test_arithmetic_rounds_as_the_casts_do():
    u = jnp.linspace(-8, 8, 4097)
    np.testing.assert_array_equal(to_code(u, None), to_nearest(u).astype(jnp.float32))
    draw = jax.random.uniform(jax.random.key(0), u.shape)
    np.testing.assert_array_equal(to_code(u, draw), stochastic_round(u, draw))
    scales = jnp.exp2(jnp.linspace(-12, 8.8, 4096))
    rounded = scales.astype(fmt.SCALE_DTYPE).astype(jnp.float32)
    np.testing.assert_array_equal(to_scale(scales), rounded)
    assert to_scale(jnp.float32(1e6)) == 448 and jnp.isnan(to_scale(jnp.float32(jnp.nan)))


def test_rows_rotate_without_transposing_and_products_contract_any_axis():
    x = jax.random.normal(jax.random.key(0), (32, 16))
    np.testing.assert_array_equal(np.asarray(rotate_rows(x), "f4"), np.asarray(rotate(x.T).T, "f4"))
    a, b = (simulate(y, axis=0) for y in (x, x[:, ::-1]))
    want = np.asarray(a.values, "f8").T @ np.asarray(b.values, "f8")
    np.testing.assert_allclose(contract(a, b, (0, 0)), want, rtol=1e-5, atol=1e-5)


def test_nan_comes_out_as_nan():
    x = jnp.ones((16, 16)).at[3, 3].set(jnp.nan)
    assert jnp.isnan(simulate(x).values).all()
