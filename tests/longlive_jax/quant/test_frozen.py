"""Frozen packed kernels: dx is the dequantized product's up to the rounding of dy; no dW."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from longlive_jax.parallel.fsdp import Gather
from longlive_jax.parallel.rules import DIT, shardings, specs_for
from longlive_jax.quant.arithmetic import PackedPair
from longlive_jax.quant.frozen import fit_shards, freeze, frozen_specs, with_rounding_keys
from longlive_jax.quant.low_rank import LowRank
from longlive_jax.quant.packed import describe_kernels, resident_bytes
from longlive_jax.quant.policy import Format, QuantPolicy, Recipe, named
from longlive_jax.quant.recipe import ProductConfig, product
from pallas_kernels.nvfp4 import dequantize, quantize

TOKENS, INPUTS, OUTPUTS = 24, 32, 64
PATH = "blocks/ffn/up/kernel"


def policy(**recipe):
    form = Format(tile=16, recipe=Recipe(frozen=True, **recipe))
    return QuantPolicy("mine", ((PATH, form),))


NEAREST, STOCHASTIC = policy(stochastic=None), policy()


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def tree(kernel):
    return {"blocks": {"ffn": {"up": {"kernel": kernel}}}}


def kernel_of(params):
    return params["blocks"]["ffn"]["up"]["kernel"]


def frozen(which, kernel=None, **options):
    kernel = normal(0, INPUTS, OUTPUTS) if kernel is None else kernel
    return freeze(tree(kernel), which, **({"gradient": True} | options))


@jax.jit
def dx_of(kernel, grad, key=None):
    """The gradient of the activations, which does not depend on them."""
    params = tree(kernel) if key is None else with_rounding_keys(tree(kernel), key)
    x, bias = jnp.zeros((*grad.shape[:-1], INPUTS), grad.dtype), jnp.zeros(OUTPUTS)
    return jax.vjp(lambda x: kernel_of(params).product(x, bias), x)[1](grad)[0]


def off(got, want) -> float:
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_dx_is_the_dequantized_product_of_the_rounded_gradient(implementation):
    kernel = kernel_of(frozen(NEAREST, implementation=implementation))
    grad, values = normal(1, TOKENS, OUTPUTS), np.asarray(kernel.dequantized(), np.float64)
    rounded = np.asarray(dequantize(quantize(grad), jnp.float32), np.float64)
    got = dx_of(kernel, grad)
    assert off(got, rounded @ values.T) < 1e-6
    assert 0.02 < off(got, np.asarray(grad, np.float64) @ values.T) < 0.15
    # Without a gradient there is no copy, and dy is not quantized.
    plain = kernel_of(frozen(NEAREST, implementation=implementation, gradient=False))
    assert plain.transposed is None
    assert off(dx_of(plain, grad), np.asarray(grad, np.float64) @ values.T) < 1e-6
    # A copy is kept where products read it.
    assert (kernel.transposed is None) == (implementation == "xla")


@pytest.mark.parametrize("which", [NEAREST, STOCHASTIC])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_dx_equals_the_dequantized_product_where_dy_needs_no_rounding(which, implementation):
    kernel = kernel_of(frozen(which, implementation=implementation))
    # Every block has the largest code, so all scales are equal and every value is a code.
    codes = jax.random.randint(jax.random.key(2), (TOKENS, OUTPUTS), 0, 8)
    grad = jnp.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes].at[:, ::16].set(6.0)
    want = np.asarray(grad, np.float64) @ np.asarray(kernel.dequantized(), np.float64).T
    assert off(dx_of(kernel, grad, jax.random.key(3)), want) < 1e-6


def test_the_transposed_copy_has_the_values_of_the_matrix():
    stack = normal(0, 2, INPUTS, OUTPUTS)
    kernel = kernel_of(frozen(STOCHASTIC, stack, implementation="reference"))
    got = dequantize(kernel.transposed, jnp.float32)
    np.testing.assert_array_equal(got, kernel.dequantized())
    assert kernel.nbytes == kernel.weight.nbytes + kernel.transposed.nbytes


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_dx_is_unbiased_over_keys_and_fixed_by_a_key(implementation):
    """The mean of 400 draws is within six standard errors in all of 768 entries."""
    kernel = kernel_of(frozen(STOCHASTIC, implementation=implementation))
    grad = normal(1, TOKENS, OUTPUTS)
    keys = jax.random.split(jax.random.key(4), 400)
    draws = np.asarray(jax.lax.map(lambda key: dx_of(kernel, grad, key), keys), np.float64)
    want = np.asarray(grad, np.float64) @ np.asarray(kernel.dequantized(), np.float64).T
    error = draws.std(0) / len(keys) ** 0.5
    assert np.abs((draws.mean(0) - want) / error).max() < 6
    assert off(draws.mean(0), want) < 0.1 * off(draws[0], want)
    np.testing.assert_array_equal(dx_of(kernel, grad, keys[0]), draws[0].astype(np.float32))
    assert off(draws[0], draws[1]) > 0.01


def test_dx_is_that_of_the_training_recipe():
    """With nearest rounding, from the same packed matrix."""
    kernel = kernel_of(frozen(NEAREST))
    x, grad = normal(2, 32, INPUTS), normal(1, 32, OUTPUTS)
    config, key = ProductConfig(NEAREST.rules[0][1]), jax.random.key(0)

    def trained(x):
        pair = PackedPair(kernel.weight)
        return product(config, x, jnp.zeros((INPUTS, OUTPUTS)), pair, jnp.zeros(OUTPUTS), key)

    y, back = jax.vjp(trained, x)
    assert off(dx_of(kernel, grad), back(grad)[0]) < 1e-6
    assert off(kernel.product(x, jnp.zeros(OUTPUTS)), y) < 1e-6


@pytest.mark.parametrize("which", ["nvfp4_frozen", "fp8"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_branch_and_bias_have_the_exact_gradient(which, dtype):
    """Also through a scan over layers that recomputes."""
    params = frozen(named(which), normal(0, 2, INPUTS, INPUTS))
    a, b = normal(1, 2, INPUTS, 4), normal(2, 2, 4, INPUTS)
    x, grad = normal(3, TOKENS, INPUTS, dtype=dtype), normal(4, TOKENS, INPUTS, dtype=dtype)
    bias = jnp.zeros((2, INPUTS))

    def last(trained):
        """The gradient of the last layer's branch has met no rounding."""
        a, b, bias = trained
        kernel = kernel_of(with_rounding_keys(params, jax.random.key(5)))
        kernel = dataclasses.replace(kernel, branch=LowRank(a, b, 0.5))

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def layer(x, xs):
            kernel, bias = xs
            return kernel.product(x, bias), x

        y, inputs = jax.lax.scan(layer, x, (kernel, bias))
        return jnp.sum((y * grad).astype(jnp.float32)), inputs[1]

    (da, db, dbias), inputs = jax.jit(jax.grad(last, has_aux=True))((a, b, bias))
    rows, dy = (np.asarray(z, np.float64) for z in (inputs, grad))
    down, up = (np.asarray(z[1], np.float64) for z in (a, b))
    limit = 1e-5 if dtype == jnp.float32 else 2e-2
    assert off(da[1], 0.5 * rows.T @ dy @ up.T) < limit
    assert off(db[1], 0.5 * (rows @ down).T @ dy) < limit
    assert off(dbias[1], dy.sum(0)) < limit
    # The first layer's gradient went through the rounded one of the second.
    assert off(da[0], da[1]) > 0.1 and np.isfinite(np.asarray(da[0])).all()


def test_fp8_rounds_dy_to_e4m3_per_token():
    kernel = kernel_of(frozen(QuantPolicy("mine", ((PATH, Format(kind="fp8")),))))
    grad = normal(1, TOKENS, OUTPUTS) * 10.0 ** jnp.linspace(-4, 4, TOKENS)[:, None]
    values = np.asarray(kernel.dequantized(), np.float64)
    want = np.asarray(grad, np.float64) @ values.T
    got = np.asarray(dx_of(kernel, grad), np.float64)
    # Every token has its own scale: an error of half a unit in the last of three bits.
    errors = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    assert errors.min() > 0.005 and errors.max() < 0.06
    plain = dataclasses.replace(kernel, quantize_gradient=False)
    assert off(dx_of(plain, grad), want) < 1e-6
    # Values that E4M3 represents are multiplied exactly: powers of two, with scales of one.
    unit = dataclasses.replace(kernel, scales=jnp.ones_like(kernel.scales))
    exact = (2.0 ** jax.random.randint(jax.random.key(2), grad.shape, 0, 4)).at[:, 0].set(448.0)
    want = np.asarray(exact, np.float64) @ np.asarray(unit.dequantized(), np.float64).T
    assert off(dx_of(unit, exact), want) < 1e-6


def test_a_recipe_without_keys_is_refused():
    kernel = kernel_of(frozen(STOCHASTIC))
    with pytest.raises(ValueError, match=r"needs keys; call .*with_rounding_keys"):
        dx_of(kernel, normal(1, TOKENS, OUTPUTS))
    with pytest.raises(ValueError, match=r"has no recipe for the gradient; 'nvfp4_frozen' has"):
        freeze(tree(normal(0, INPUTS, OUTPUTS)), named("nvfp4"), gradient=True)
    assert not named("nvfp4_frozen").trains


def test_keys_differ_by_layer_and_kernel():
    params = {
        "blocks": {"ffn": {name: {"kernel": normal(0, 2, 32, 32)} for name in ("up", "down")}}
    }
    keyed = with_rounding_keys(
        freeze(params, named("nvfp4_frozen"), gradient=True), jax.random.key(0)
    )
    kernels = [keyed["blocks"]["ffn"][name]["kernel"] for name in ("up", "down")]
    data = np.concatenate([jax.random.key_data(kernel.key) for kernel in kernels])
    assert len(np.unique(data, axis=0)) == 4
    assert describe_kernels(keyed)[0].startswith(
        "4 matrices in NVFP4 (weights mse, activations mse, gradients mse)"
    )
    assert resident_bytes(keyed)["packed"] == sum(kernel.nbytes for kernel in kernels)


@pytest.mark.parametrize("which", ["nvfp4_frozen", "fp8"])
def test_a_mesh_gives_the_product_of_one_device(which):
    """Tokens, matrices and branches are sharded; layers are gathered where they are used."""
    # 1. Frozen parameters of two layers, sharded.
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "sp"), axis_types=(AxisType.Auto,) * 3)
    axes, kernel = mesh.axis_names, normal(0, 2, 64, 64)
    policy = named(which)
    if which == "nvfp4_frozen":
        policy = QuantPolicy("mine", ((r"blocks/.*", NEAREST.rules[0][1]),))
    branch = LowRank(normal(1, 2, 64, 4), normal(2, 2, 4, 64), 0.5)

    def build(axes):
        params = freeze(tree(kernel), policy, gradient=True, axes=axes)
        own = dataclasses.replace(kernel_of(params), branch=branch)
        return fit_shards(tree(own), specs, mesh.shape)

    specs = specs_for(DIT, tree(kernel))
    params = build(axes)
    sharded = frozen_specs(params, specs)
    assert jax.tree.structure(sharded) == jax.tree.structure(params)
    gather, x, grad = Gather(sharded), normal(3, 128, 64), normal(4, 128, 64)

    # 2. Value and gradients of activations and branch, taken outside of the `shard_map`.
    def forward(params, x, gather=lambda layer: layer):
        for i in range(2):
            layer = tree(jax.tree.map(lambda leaf: leaf[i], kernel_of(params)))  # noqa: B023
            x = kernel_of(gather(layer)).product(x, jnp.zeros(64))
        return x

    over_mesh = jax.shard_map(
        lambda params, x: forward(params, x, lambda p: gather.tree(p, sharded, stacked=True)),
        mesh=mesh,
        in_specs=(sharded, P(axes)),
        out_specs=P(axes),
        check_vma=False,
    )

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, params, x, grad):
        def of(x, branch):
            return function(tree(dataclasses.replace(kernel_of(params), branch=branch)), x)

        y, back = jax.vjp(of, x, kernel_of(params).branch)
        return y, *back(grad)

    got = run(over_mesh, jax.device_put(params, shardings(mesh, sharded)), x, grad)
    want = run(forward, build(()), x, grad)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert off(a, b) < 1e-6
