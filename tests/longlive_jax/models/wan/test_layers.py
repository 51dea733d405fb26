"""The written-out gradient of the linear layers."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from longlive_jax.models.wan import DiTConfig
from longlive_jax.models.wan.layers import Linear, affine


def plain(x, kernel, bias):
    return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


@pytest.fixture
def arrays():
    shapes = ((2, 5, 8), (8, 6), (6,), (2, 5, 6))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def test_values_and_gradients_are_those_of_the_plain_formula(arrays):
    *arguments, weight = arrays
    got, want = (
        jax.value_and_grad(lambda *args, fn=fn: jnp.sum(fn(*args) * weight), (0, 1, 2))(*arguments)
        for fn in (affine, plain)
    )
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


def test_sixteen_bit_products_have_float32_gradients(arrays):
    x, kernel, bias, weight = arrays
    half = x.astype(jnp.bfloat16)
    to_x, *to_params = jax.grad(
        lambda *args: jnp.sum(affine(*args).astype(jnp.float32) * weight), (0, 1, 2)
    )(half, kernel, bias)
    assert to_x.dtype == jnp.bfloat16
    rounded = weight.astype(jnp.bfloat16).astype(jnp.float32)
    exact = jnp.einsum("bli,blo->io", half.astype(jnp.float32), rounded), rounded.sum((0, 1))
    chex.assert_trees_all_close(tuple(to_params), exact, rtol=1e-5, atol=1e-5)


def test_an_empty_input_has_a_zero_gradient():
    linear = Linear(4, 3, DiTConfig(), rngs=nnx.Rngs(0))
    to_kernel = jax.grad(lambda k: affine(jnp.zeros((0, 4)), k, jnp.zeros(3)).sum())(
        linear.kernel[...]
    )
    assert to_kernel.shape == (4, 3) and not to_kernel.any()
