"""The random Hadamard transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nvfp4.hadamard import SIGNS, matrix, rotate


def test_equals_the_golden(goldens):
    with np.load(goldens / "rht.npz") as file:
        assert tuple(file["rht_signs"]) == SIGNS
        np.testing.assert_array_equal(matrix(), file["rht_matrix"])
        for dtype in (jnp.bfloat16, jnp.float32):
            got = rotate(jnp.asarray(file["rht_example_in"], dtype))
            assert got.dtype == jnp.bfloat16
            np.testing.assert_array_equal(np.float32(got), file["rht_example_out"])


def test_products_of_rotated_operands_are_unchanged():
    random_signs = jax.random.rademacher(jax.random.key(0), (16,), jnp.int32)
    for signs in (SIGNS, random_signs):
        r = matrix(signs)
        np.testing.assert_array_equal(r @ r.T, np.eye(16))
    x, y = (jax.random.normal(jax.random.key(i), (4, 64)) for i in (1, 2))
    got = jnp.float32(rotate(x, signs)) @ jnp.float32(rotate(y, signs)).T
    np.testing.assert_allclose(got, x @ y.T, atol=0.1)


def test_float32_is_rounded_once_at_the_end():
    x = jax.random.normal(jax.random.key(1), (64, 32)) * (1 + 2.0**-12)
    exact = np.asarray(x, np.float64).reshape(-1, 16) @ np.asarray(matrix(), np.float64)
    want = np.asarray(exact.reshape(x.shape), np.float32).astype(jnp.bfloat16)
    for run in (rotate, jax.jit(rotate)):
        assert np.mean(np.asarray(run(x)) != want) < 1e-3


def test_an_axis_that_is_not_a_multiple_of_16_is_refused():
    with pytest.raises(ValueError, match="the axis must be a multiple of 16, got 24"):
        rotate(jnp.zeros((4, 24)))
