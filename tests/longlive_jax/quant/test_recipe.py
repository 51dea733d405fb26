"""The product of NVFP4 training: equal to the reference, and unbiased."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from longlive_jax.quant.arithmetic import PackedPair, transpose_tiles
from longlive_jax.quant.policy import Format, Recipe
from longlive_jax.quant.recipe import ProductConfig, TrainingKernel, product
from pallas_kernels.nvfp4 import dequantize, quantize, rotate

NEAREST = Recipe(stochastic=None)
TOKENS, INPUTS, OUTPUTS = 48, 32, 64


def form(recipe=NEAREST) -> Format:
    return Format(weights="static_6", tile=16, activations="mse", recipe=recipe)


def operands(tokens=TOKENS, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (tokens, INPUTS)).astype(dtype)
    kernel = jax.random.normal(keys[1], (INPUTS, OUTPUTS))
    bias = jax.random.normal(keys[2], (OUTPUTS,))
    grad = jax.random.normal(keys[3], (tokens, OUTPUTS)).astype(dtype)
    return x, kernel, bias, grad


def packed_of(kernel, rule="static_6"):
    return quantize(kernel, rule=rule, block_rows=16, transpose=True, implementation="reference")


@functools.partial(jax.jit, static_argnames=("config",))
def results(config, x, kernel, bias, grad, key):
    """y, dx, dW, db."""
    packed = PackedPair(packed_of(kernel))
    y, back = jax.vjp(lambda x, w, b: product(config, x, w, packed, b, key), x, kernel, bias)
    return y, *back(grad)


def off(got, want) -> float:
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def by_hand(x, kernel, bias, grad, recipe):
    """The recipe in float64, from dequantized operands."""
    options = {"implementation": "reference"}

    def values(a, rule="mse", **more):
        run = jax.jit(lambda a: dequantize(quantize(a, rule=rule, **options, **more), jnp.float32))
        return np.asarray(run(a), np.float64)

    q_x, q_grad = values(x), values(grad)
    q_w = np.asarray(dequantize(packed_of(kernel), jnp.float32), np.float64)
    activations = jnp.asarray(q_x, jnp.bfloat16) if recipe.twice else x
    columns = [values(a, transpose=True, hadamard=recipe.hadamard) for a in (activations, grad)]
    db = np.asarray(grad, np.float64).sum(0)
    return q_x @ q_w.T + np.asarray(bias), q_grad @ q_w, columns[0] @ columns[1].T, db


@pytest.mark.parametrize(
    ("implementation", "recipe"),
    [("reference", NEAREST), ("xla", Recipe(stochastic=None, hadamard=False, twice=True))],
)
def test_products_are_those_of_the_recipe(implementation, recipe):
    config = ProductConfig(form(recipe), implementation=implementation)
    inputs = operands(dtype=jnp.float32)
    inputs = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in inputs]
    got = results(config, *inputs, jax.random.key(0))
    for name, a, b in zip(("y", "dx", "dw", "db"), got, by_hand(*inputs, recipe), strict=True):
        # A block whose two candidates have equal errors may go either way if sums are fused.
        assert off(a, b) < (1e-5 if implementation == "reference" or name != "dw" else 1e-2), name
    assert [a.dtype for a in got] == [jnp.float32] * 4


def test_packed_and_simulated_arithmetic_agree():
    """The case has stochastic rounding, bfloat16, three axes and an incomplete group of tokens."""
    x, kernel, bias, grad = operands(tokens=24)
    x, grad = x.reshape(2, 12, -1), grad.reshape(2, 12, -1)
    configs = [ProductConfig(form(Recipe()), implementation=name) for name in ("reference", "xla")]
    packed, simulated = (
        results(config, x, kernel, bias, grad, jax.random.key(3)) for config in configs
    )
    assert packed[0].dtype == packed[1].dtype == jnp.bfloat16
    assert packed[0].shape == (2, 12, OUTPUTS) and packed[1].shape == x.shape
    for a, b in zip(packed, simulated, strict=True):
        assert off(a, b) < 1e-2
    np.testing.assert_allclose(packed[3], np.asarray(grad, np.float64).sum((0, 1)), rtol=1e-5)


def sampled_gradients(recipe, grad, samples=512):
    """dx and dW for each of many keys, each with the value for an unquantized gradient."""
    x, kernel, bias, _ = operands(dtype=jnp.float32)
    keys = jax.random.split(jax.random.key(5), samples)
    run = functools.partial(results, ProductConfig(form(recipe)), x, kernel, bias, grad)
    each = jax.lax.map(lambda key: run(key)[1:3], keys)
    w = np.asarray(dequantize(packed_of(kernel), jnp.float32), np.float64)
    options = {"hadamard": recipe.hadamard, "implementation": "reference"}
    q_x = np.asarray(dequantize(quantize(x, transpose=True, **options), jnp.float32), np.float64)
    grad_t = np.asarray(rotate(grad.T) if recipe.hadamard else grad.T, np.float64)
    exact = np.asarray(grad, np.float64) @ w, q_x @ grad_t.T
    return [(np.asarray(a, np.float64), b) for a, b in zip(each, exact, strict=True)]


@pytest.mark.parametrize("rule", ["static_6", "mse"])
def test_stochastic_rounding_is_unbiased(rule):
    """The mean gradients over keys are those of an unquantized gradient."""
    grad = operands(dtype=jnp.float32)[3]
    for each, want in sampled_gradients(Recipe(gradients=rule, hadamard=False), grad):
        spread = each.std(0) / len(each) ** 0.5
        score = (each.mean(0) - want) / spread
        assert np.abs(score).max() < 5.5  # about 2000 entries
        assert 0.9 < np.sqrt(np.mean(score**2)) < 1.1
        assert off(each[0], want) > 10 * off(each.mean(0), want)


def test_the_published_recipe_is_nearly_unbiased():
    """Clipping and 4-over-6, which prefers noise that errs less, cause a small bias."""
    recipe = Recipe(stochastic="reference")
    for each, want in sampled_gradients(recipe, operands(dtype=jnp.float32)[3]):
        assert off(each.mean(0), want) < 0.25 * off(each[0], want)


def test_noise_differs_between_keys_and_between_chunks_of_tokens():
    x, kernel, bias, grad = operands()
    config = ProductConfig(form(Recipe()))
    run = functools.partial(results, config, x, kernel, bias)
    first, again = (run(grad, jax.random.key(1))[2] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert off(run(grad, jax.random.key(2))[2], first) > 0.01
    rows = 2 * grad  # the same blocks at twice the scale: other noise with the same key
    assert off(run(rows, jax.random.key(1))[2] / 2, first) > 0.01


def test_transposed_tiles_equal_the_packed_transpose():
    kernel = operands()[1]
    for a, b in zip(
        jax.tree.leaves(transpose_tiles(packed_of(kernel))),
        jax.tree.leaves(packed_of(kernel.T)),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_a_stack_of_layers_is_scanned_and_only_masters_have_gradients():
    x, kernel, bias, grad = operands()
    kernel = jnp.stack([kernel, -kernel])
    packed = quantize(kernel, rule="static_6", block_rows=16, lead=1, transpose=True)
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def gradient(master):
        def loss(master):
            stack = TrainingKernel(master, PackedPair(packed), keys, ProductConfig(form()))

            @functools.partial(jax.checkpoint, prevent_cse=False)
            def layer(x, kernel):
                return x, kernel.product(x, bias)

            return jnp.sum(jax.lax.scan(layer, x, stack)[1] * grad)

        return jax.grad(loss)(master)

    want = [results(ProductConfig(form()), x, k, bias, grad, jax.random.key(0))[2] for k in kernel]
    np.testing.assert_allclose(gradient(kernel), jnp.stack(want), rtol=1e-6)


def test_a_mesh_gives_the_scales_and_sums_of_one_device():
    """The sharded tokens are in another order, in whole groups of 16."""
    # 1. Operands, and a permutation of the groups.
    tokens, sizes = 128, (2, 2, 2)
    x, kernel, bias, grad = operands(tokens, jnp.float32)
    order = np.random.default_rng(0).permutation(tokens // 16)
    order = (16 * order[:, None] + np.arange(16)).reshape(-1)
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "sp"), axis_types=(AxisType.Auto,) * 3)
    axes, packed = mesh.axis_names, PackedPair(packed_of(kernel))

    # 2. The product and its gradients on every device.
    def local(x, kernel, bias, grad):
        config, key = ProductConfig(form(), axes), jax.random.key(0)
        amax = config.quantize(x, "mse").along.amax
        y, back = jax.vjp(lambda x, w, b: product(config, x, w, packed, b, key), x, kernel, bias)
        dx, *sums = back(grad)
        return y, dx, *jax.lax.psum(sums, axes), amax

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(axes), P(), P(), P(axes)),
        out_specs=(P(axes), P(axes), P(), P(), P()),
        check_vma=False,
    )
    # 3. The same on one device.
    *got, amax = jax.jit(sharded)(x[order], kernel, bias, grad[order])
    want = results(ProductConfig(form()), x, kernel, bias, grad, jax.random.key(0))
    want = [want[0][order], want[1][order], *want[2:]]
    for a, b in zip(got, want, strict=True):
        assert off(a, b) < 1e-6
    assert amax == jnp.abs(x).max()


def test_tokens_per_device_must_be_a_multiple_of_16():
    config = dataclasses.replace(ProductConfig(form()), axes=("sp",))
    with pytest.raises(ValueError, match=r"a multiple of 16 tokens per device, got 40"):
        config.quantize(jnp.zeros((40, 16)), "mse")
