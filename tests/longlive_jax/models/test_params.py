"""Conversion between modules and parameters, and the named model variants."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from longlive_jax.models.params import abstract, params_of, with_params
from longlive_jax.models.variants import VARIANTS, variant
from longlive_jax.models.wan import DiT


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        return self.layers[1](self.layers[0](x))


def test_module_to_parameters_and_back():
    pair = Pair(nnx.Rngs(0))
    params = params_of(pair)
    assert set(params["layers"]) == {0, 1}
    doubled = jax.tree.map(lambda x: 2 * x, params)
    x = jnp.ones((1, 2))
    chex.assert_trees_all_close(with_params(pair, doubled)(x), 4 * pair(x), rtol=1e-6)
    chex.assert_trees_all_equal(params_of(pair), params)  # the module is unchanged

    graphdef, shapes = abstract(lambda: Pair(nnx.Rngs(0)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, shapes)
    grads = jax.jit(jax.grad(lambda p: with_params(graphdef, p)(x).sum()))(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


def test_the_5b_model_has_its_size_without_allocation():
    cfg = variant("wan2_2_ti2v_5b")["dit"]
    _, shapes = abstract(lambda: DiT(cfg, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 4_999_787_712
    assert shapes["blocks"]["self_attn"]["q"]["kernel"].shape == (30, 3072, 3072)


def test_an_unknown_variant_suggests_the_nearest():
    assert "wan2_2_ti2v_5b" in VARIANTS
    with pytest.raises(ValueError, match="nearest is 'wan2_2_ti2v_5b'"):
        variant("wan22_5b")
