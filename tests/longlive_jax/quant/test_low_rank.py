"""Low-rank branches: the same results as merged, gradients of the factors alone, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.quant.low_rank import Dropout, LoRAKernel, LowRank, with_branches


@pytest.fixture
def kernel_and_branch():
    keys = jax.random.split(jax.random.key(0), 3)
    kernel, a, b = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((2, 6, 5), (2, 6, 3), (2, 3, 5)), strict=True)
    )
    return kernel, LowRank(a, b, 2.0)


def test_unmerged_equals_merged(kernel_and_branch):
    adapted = LoRAKernel(*kernel_and_branch)
    x, bias = jnp.ones((4, 6)), jnp.arange(5.0)
    got = jax.tree.map(lambda leaf: leaf[1], adapted).product(x, bias)
    np.testing.assert_allclose(got, x @ adapted.merged()[1] + bias, rtol=1e-5, atol=1e-5)


def test_branches_are_attached_by_path(kernel_and_branch):
    kernel, branch = kernel_and_branch
    params = {"blocks": {"up": {"kernel": kernel, "bias": jnp.zeros(5)}}}
    changed = with_branches(params, {"blocks/up/kernel": branch})
    assert isinstance(changed["blocks"]["up"]["kernel"], LoRAKernel)
    assert changed["blocks"]["up"]["bias"] is params["blocks"]["up"]["bias"]
    with pytest.raises(ValueError, match="no kernel at blocks/down/kernel"):
        with_branches(params, {"blocks/down/kernel": branch})


def first_layer(kernel_and_branch, dtype=jnp.float32):
    """One layer's frozen kernel in `dtype`, with float32 factors."""
    adapted = jax.tree.map(lambda leaf: leaf[0], LoRAKernel(*kernel_and_branch))
    return LoRAKernel(adapted.kernel.astype(dtype), adapted.branch)


def test_gradients_are_those_of_the_merged_matrix(kernel_and_branch):
    adapted, x = first_layer(kernel_and_branch), jnp.linspace(-1, 1, 24).reshape(2, 2, 6)
    weight = jnp.linspace(0, 1, 20).reshape(2, 2, 5)

    def branched(x, a, b):
        y = LoRAKernel(adapted.kernel, LowRank(a, b, 2.0)).product(x, jnp.zeros(5))
        return jnp.sum(weight * y**2)

    def merged(x, a, b):
        return jnp.sum(weight * (x @ (adapted.kernel + 2 * a @ b)) ** 2)

    arguments = (x, adapted.branch.a, adapted.branch.b)
    for got, want in zip(
        jax.grad(branched, (0, 1, 2))(*arguments),
        jax.grad(merged, (0, 1, 2))(*arguments),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_the_frozen_kernel_has_no_gradient(kernel_and_branch):
    adapted, x = first_layer(kernel_and_branch), jnp.ones((4, 6))

    def loss(kernel, branch):
        return jnp.sum(LoRAKernel(kernel, branch).product(x, jnp.zeros(5)))

    assert not jnp.any(jax.grad(loss)(adapted.kernel, adapted.branch))
    products = str(jax.make_jaxpr(jax.grad(loss, 1))(adapted.kernel, adapted.branch))
    assert "[6,3] = dot_general" in products and "[6,5] = dot_general" not in products


def test_gradients_of_the_factors_are_not_rounded_to_bfloat16(kernel_and_branch):
    adapted = first_layer(kernel_and_branch, jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (64, 6), jnp.bfloat16)

    def loss(factors, x):
        kernel = LoRAKernel(adapted.kernel, LowRank(*factors, 2.0))
        return jnp.sum(kernel.product(x, jnp.zeros(5)).astype(jnp.float32) ** 2)

    grads = jax.grad(loss)((adapted.branch.a, adapted.branch.b), x)
    for grad in grads:
        assert grad.dtype == jnp.float32
        assert jnp.any(grad != grad.astype(jnp.bfloat16).astype(jnp.float32))


def test_dropout_keeps_the_mean_and_repeats_its_mask():
    x = jnp.ones((400, 50))
    dropout = Dropout(jax.random.key(3), 0.25)
    y = dropout(x)
    assert set(np.unique(y).round(4)) == {0.0, np.float32(1.3333)}
    assert abs(float(y.mean()) - 1) < 0.02
    np.testing.assert_array_equal(y, dropout(x))
    assert jnp.any(y != Dropout(jax.random.key(4), 0.25)(x))
