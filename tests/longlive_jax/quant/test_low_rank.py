"""Unmerged LoRA: the same results as merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.quant.low_rank import LoRAKernel, LowRank, with_branches


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
