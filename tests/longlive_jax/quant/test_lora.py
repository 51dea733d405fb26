"""Adapters: initial values, attached to arrays and packed kernels, merged, and refused."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.parallel import rules
from longlive_jax.quant.lora import (
    LoRASpec,
    adapter_specs,
    init_adapter,
    merge_adapter,
    num_adapted,
    with_adapter,
    without_dropout,
)
from longlive_jax.quant.low_rank import LoRAKernel
from longlive_jax.quant.packed import Fp8Kernel, PackedKernel, quantize_params
from longlive_jax.quant.policy import named

LAYERS, WIDTH, HIDDEN = 2, 32, 48


def params_of(key=0):
    """Two stacked linears of a block, and a linear outside of the blocks."""
    keys = iter(jax.random.split(jax.random.key(key), 5))

    def linear(*shape):
        return {
            "kernel": jax.random.normal(next(keys), shape) * shape[-2] ** -0.5,
            "bias": jnp.zeros((*shape[:-2], shape[-1])),
        }

    ffn = {"up": linear(LAYERS, WIDTH, HIDDEN), "down": linear(LAYERS, HIDDEN, WIDTH)}
    return {"blocks": {"ffn": ffn}, "head": {"linear": linear(WIDTH, 8)}}


def trained(params, spec, key=7):
    """An adapter whose second factor is not zero."""
    adapter = init_adapter(jax.random.key(key), params, spec)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(9), x.shape), adapter)


def apply(params, x):
    """The block's layers, scanned, then the head."""

    def product(x, linear):
        kernel, bias = linear["kernel"], linear["bias"]
        return kernel.product(x, bias) if hasattr(kernel, "product") else x @ kernel + bias

    def layer(x, ffn):
        return x + product(jnp.tanh(product(x, ffn["up"])), ffn["down"]), None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["blocks"]["ffn"])
    return product(x, params["head"]["linear"])


X = np.asarray(jax.random.normal(jax.random.key(5), (16, WIDTH)))


def test_a_new_adapter_is_uniform_by_its_inputs_and_changes_nothing():
    params, spec = params_of(), LoRASpec(rank=4)
    adapter = init_adapter(jax.random.key(0), params, spec)
    assert num_adapted(adapter) == 4 and set(adapter) == {"blocks"}
    up, down = adapter["blocks"]["ffn"]["up"], adapter["blocks"]["ffn"]["down"]
    assert up["a"].shape == (LAYERS, WIDTH, 4) and up["b"].shape == (LAYERS, 4, HIDDEN)
    for a, inputs in ((up["a"], WIDTH), (down["a"], HIDDEN)):
        assert a.dtype == jnp.float32
        assert 0.95 < float(jnp.abs(a).max()) * inputs**0.5 <= 1
    assert jnp.any(up["a"][0] != up["a"][1])
    np.testing.assert_array_equal(apply(with_adapter(params, adapter, spec), X), apply(params, X))


def test_unmerged_equals_merged_with_scale():
    params, spec = params_of(), LoRASpec(rank=4, alpha=2)
    assert spec.scale == 0.5
    adapter = trained(params, spec)
    unmerged = apply(with_adapter(params, adapter, spec), X)
    np.testing.assert_array_equal(unmerged, apply(with_adapter(params, adapter, 0.5), X))
    merged = merge_adapter(params, adapter, spec.scale)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)
    np.testing.assert_allclose(apply(merged, X), unmerged, rtol=1e-5, atol=1e-5)
    assert jnp.abs(unmerged - apply(params, X)).max() > 0.1


@pytest.mark.parametrize("policy", ["nvfp4", "fp8"])
def test_packed_kernels_take_an_adapter(policy):
    params, spec = params_of(), LoRASpec(rank=4)
    packed, adapter = quantize_params(params, named(policy)), trained(params, spec)
    adapted = with_adapter(packed, adapter, spec)
    kernel = adapted["blocks"]["ffn"]["up"]["kernel"]
    assert isinstance(kernel, PackedKernel | Fp8Kernel) and kernel.branch is not None

    def alone(adapter):
        ffn = with_adapter(packed, adapter, spec)["blocks"]["ffn"]["up"]
        first = jax.tree.map(lambda x: x[0], ffn)
        return first["kernel"].product(X, first["bias"])

    zero = jax.tree.map(jnp.zeros_like, adapter)
    up = jax.tree.map(lambda x: x[0], adapter["blocks"]["ffn"]["up"])
    np.testing.assert_allclose(
        alone(adapter) - alone(zero), X @ up["a"] @ up["b"], rtol=1e-3, atol=1e-4
    )
    grads = jax.grad(lambda a: jnp.sum(apply(with_adapter(packed, a, spec), X) ** 2))(adapter)
    assert all(jnp.any(x != 0) and x.dtype == jnp.float32 for x in jax.tree.leaves(grads))
    with pytest.raises(
        ValueError, match="blocks/ffn/down/kernel is packed; merge an adapter before"
    ):
        merge_adapter(packed, adapter, 1.0)


def test_rematerialised_layers_draw_the_same_masks():
    params, spec = params_of(), LoRASpec(rank=4, dropout=0.5)
    adapter = trained(params, spec)

    def loss(adapter, step, key=None):
        adapted = with_adapter(params, adapter, spec, key=key)
        return jnp.sum(apply(adapted, X * step) ** 2)

    # The derivative along a direction, which uses the recomputed masks, against the difference.
    key = jax.random.key(11)
    grads = jax.grad(loss)(adapter, 1.0, key)
    size, direction = 1e-2, jax.tree.map(lambda x: x / norm_of(grads), grads)
    moved = [
        loss(jax.tree.map(lambda x, d, s=s: x + s * size * d, adapter, direction), 1.0, key)
        for s in (1, -1)
    ]
    slope = sum(
        jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True)
    )
    np.testing.assert_allclose((moved[0] - moved[1]) / (2 * size), slope, rtol=1e-2)
    # Another key is another mask; without a key there is none.
    assert loss(adapter, 1.0, key) != loss(adapter, 1.0, jax.random.key(12))
    plain = with_adapter(params, adapter, dataclasses.replace(spec, dropout=0.0))
    np.testing.assert_allclose(loss(adapter, 1.0), jnp.sum(apply(plain, X) ** 2), rtol=1e-6)


def norm_of(tree):
    return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))


def test_every_kernel_and_layer_has_its_own_key():
    spec = LoRASpec(rank=4, dropout=0.1)
    adapter = init_adapter(jax.random.key(0), params_of(), spec)
    adapted = with_adapter(params_of(), adapter, spec, key=jax.random.key(1))
    ffn = adapted["blocks"]["ffn"]
    keys = [jax.random.key_data(ffn[name]["kernel"].branch.dropout.key) for name in ffn]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 2 * LAYERS


def test_specs_have_the_structure_of_the_adapted_parameters():
    params, spec = params_of(), LoRASpec(rank=4, dropout=0.1)
    adapter = init_adapter(jax.random.key(0), params, spec)
    own = rules.specs_for(rules.ADAPTER, adapter)
    specs = adapter_specs(rules.specs_for(rules.DIT, params), own, spec, dropout=True)
    adapted = with_adapter(params, adapter, spec, key=jax.random.key(0))
    jax.tree.map(lambda *_: None, adapted, specs)
    kernel = specs["blocks"]["ffn"]["up"]["kernel"]
    assert isinstance(kernel, LoRAKernel)
    assert kernel.branch.a == rules.P(None, rules.SHARDS)
    assert kernel.branch.b == rules.P(None, None, rules.SHARDS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "lora.rank must be >= 1, got 0"),
        ({"alpha": -1.0}, "lora.alpha must be > 0, got -1.0"),
        ({"dropout": 1.0}, r"lora.dropout must be in \[0, 1\), got 1.0"),
        ({"targets": "("}, "lora.targets '\\(' is not a regular expression"),
        ({"targets": "blocks/fnn/.*"}, "lora.targets: no kernel matches 'blocks/fnn/.*'.*ffn"),
        ({"rank": 64}, r"lora.rank 64 is above the 32 of blocks/ffn/\w+/kernel"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        init_adapter(jax.random.key(0), params_of(), LoRASpec(**settings))
    assert "\n" not in str(error.value)


def test_adapters_that_do_not_fit_are_refused():
    params, spec = params_of(), LoRASpec(rank=4)
    adapter = trained(params, spec)
    other = {"blocks": {"attn": adapter["blocks"]["ffn"]}}
    with pytest.raises(ValueError, match="adapts blocks/attn/down/kernel, which the model has not"):
        with_adapter(params, other, spec)
    short = jax.tree.map(lambda x: x[:1], adapter)
    with pytest.raises(
        ValueError, match=r"factors \(1, 48, 4\) and \(1, 4, 32\) for blocks/ffn/do"
    ):
        with_adapter(params, short, spec)
    with pytest.raises(ValueError, match=r"has \['a'\] instead of a and b"):
        with_adapter(params, {"blocks": {"ffn": {"up": {"a": jnp.ones((2, 32, 4))}}}}, spec)
    with pytest.raises(ValueError, match="has a low-rank branch already"):
        with_adapter(with_adapter(params, adapter, spec), adapter, spec)


def test_branches_without_dropout_are_those_of_sampling():
    params = {"blocks": {"ffn": {"up": {"kernel": jnp.ones((2, 4, 6)), "bias": jnp.zeros((2, 6))}}}}
    spec = LoRASpec(rank=2, dropout=0.5)
    adapter = init_adapter(jax.random.key(0), params, spec)
    dropping = with_adapter(params, adapter, spec, key=jax.random.key(1))
    chex.assert_trees_all_equal(without_dropout(dropping), with_adapter(params, adapter, spec))
