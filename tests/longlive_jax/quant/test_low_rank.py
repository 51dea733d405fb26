"""LoRA beside an array: the same numbers as merged, and gradients for the branch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.quant.low_rank import LoRAKernel, LowRank, with_branches


@pytest.fixture
def parts():
    keys = jax.random.split(jax.random.key(0), 3)
    kernel, a, b = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((2, 6, 5), (2, 6, 3), (2, 3, 5)), strict=True)
    )
    return kernel, LowRank(a, b, 2.0)


def test_beside_equals_merged(parts):
    kernel, branch = parts
    both = LoRAKernel(kernel, branch)
    x, bias = jnp.ones((4, 6)), jnp.arange(5.0)
    got = jax.tree.map(lambda leaf: leaf[1], both).product(x, bias)
    np.testing.assert_allclose(got, x @ both.merged()[1] + bias, rtol=1e-5, atol=1e-5)


def test_every_branch_finds_its_kernel(parts):
    kernel, branch = parts
    params = {"blocks": {"up": {"kernel": kernel, "bias": jnp.zeros(5)}}}
    changed = with_branches(params, {"blocks/up/kernel": branch})
    assert isinstance(changed["blocks"]["up"]["kernel"], LoRAKernel)
    assert changed["blocks"]["up"]["bias"] is params["blocks"]["up"]["bias"]
    with pytest.raises(ValueError, match="no kernel at blocks/down/kernel"):
        with_branches(params, {"blocks/down/kernel": branch})
