"""Packed NVFP4 kernels: exact products, in a model, and with a LoRA."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.io.packed_kernels import packed_arrays
from longlive_jax.layout import grid
from longlive_jax.models.params import abstract, with_params
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.quant.low_rank import LoRAKernel, LowRank
from longlive_jax.quant.packed import (
    PackedKernel,
    describe_kernels,
    pack_kernel,
    quantize_params,
    resident_bytes,
)
from longlive_jax.quant.policy import Format, QuantPolicy, named
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.nvfp4 import dequantize, quantize, with_scale_layout
from tests.random_dit import random_dit

LAYERS, INPUTS, OUTPUTS, RANK = 2, 48, 24, 4
SMALL = DiTConfig(
    dim=32, ffn_dim=48, freq_dim=8, text_dim=8, text_len=4, heads=2, layers=2,
    in_channels=4, out_channels=4,
)  # fmt: skip


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.fixture(scope="module")
def kernel():
    return normal(0, LAYERS, INPUTS, OUTPUTS)


@pytest.fixture(scope="module")
def branch():
    a, b = normal(1, LAYERS, INPUTS, RANK), normal(2, LAYERS, RANK, OUTPUTS)
    return LowRank(a, b, 0.5)


def layer(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


@pytest.mark.parametrize(
    "form", [Format(), Format(weights="static_6", activations="static_6"), Format(tile=16)]
)
def test_the_product_is_that_of_the_quantized_operands(form, kernel):
    if form.tile == 16:
        kernel = normal(0, LAYERS, INPUTS, 32)
    packed = pack_kernel(kernel, form)
    x, bias = 3 * normal(3, 1, 7, INPUTS), normal(4, kernel.shape[-1])
    quantized = quantize(x.reshape(-1, INPUTS), rule=form.activations)
    rows = np.asarray(dequantize(quantized, jnp.float32), np.float64).reshape(x.shape)
    for i in range(LAYERS):
        weight = np.asarray(packed.dequantized()[i], np.float64)
        got = layer(packed, i).product(x, bias)
        assert got.shape == (1, 7, kernel.shape[-1]) and got.dtype == x.dtype
        np.testing.assert_allclose(got, rows @ weight + np.asarray(bias), rtol=1e-5, atol=1e-4)
        # The matrix is the one that quantizing a single layer gives.
        alone = quantize(kernel[i].T, rule=form.weights, block_rows=form.tile)
        np.testing.assert_array_equal(packed.dequantized()[i].T, dequantize(alone, jnp.float32))


def test_a_branch_is_added_exactly(kernel, branch):
    packed = pack_kernel(kernel, Format())
    adapted = PackedKernel(packed.weight, branch, packed.activations)
    x, bias = normal(3, 7, INPUTS), normal(4, OUTPUTS)
    plain, got = (layer(k, 0).product(x, bias) for k in (packed, adapted))
    first = layer(branch, 0)
    np.testing.assert_array_equal(got, plain + first(x))
    np.testing.assert_allclose(first(x), x @ first.a @ first.b * 0.5, rtol=1e-4, atol=1e-4)


def test_a_branch_in_bfloat16_is_fused_into_the_product(kernel, branch):
    packed = pack_kernel(kernel, Format())
    adapted = PackedKernel(packed.weight, branch, packed.activations)
    x, bias = normal(3, 7, INPUTS, dtype=jnp.bfloat16), normal(4, OUTPUTS)
    got = layer(adapted, 0).product(x, bias)
    want = layer(adapted, 0).product(x.astype(jnp.float32), bias)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.03 * float(abs(want).max()))


def test_a_merged_lora_is_quantized_with_the_matrix(kernel, branch):
    merged = LoRAKernel(kernel, branch).merged()
    np.testing.assert_allclose(merged, kernel + branch.a @ branch.b * 0.5, rtol=1e-5, atol=1e-5)
    got, unmerged = pack_kernel(merged, Format()), pack_kernel(kernel, Format())
    assert not np.array_equal(got.dequantized(), unmerged.dequantized())
    x, bias = normal(3, 7, INPUTS), jnp.zeros(OUTPUTS)
    rows = dequantize(quantize(x), jnp.float32)
    np.testing.assert_allclose(
        layer(got, 1).product(x, bias), rows @ got.dequantized()[1], rtol=1e-4, atol=1e-4
    )


def test_scanned_over_layers(kernel, branch):
    packed = PackedKernel(pack_kernel(kernel[..., :OUTPUTS], Format()).weight, branch)
    x, bias = normal(3, 7, INPUTS), normal(5, LAYERS, OUTPUTS)

    def body(total, layer):
        packed, bias = layer
        return total + packed.product(x, bias), None

    got, _ = jax.lax.scan(body, jnp.zeros((7, OUTPUTS)), (packed, bias))
    want = sum(layer(packed, i).product(x, bias[i]) for i in range(LAYERS))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def model():
    return random_dit(SMALL)


def test_a_model_runs_on_packed_kernels(model):
    graphdef, params = model
    tokens = grid(2, 2, 3, chunk_frames=2)
    x, text = normal(6, 1, 2, 4, 6, 4), normal(7, 1, 1, 4, 8)

    @jax.jit
    def velocity(params):
        dit = with_params(graphdef, params)
        return dit(x, jnp.full((1, 2), 300.0), dit.text_kv(text), tokens)[0]

    # Both kinds in one model.
    rules = (("blocks/ffn/.*/kernel", Format()), ("blocks/.*/kernel", Format(kind="fp8")))
    packed = quantize_params(params, QuantPolicy("mixed", rules))
    assert len(describe_kernels(packed)) == 2
    plain = velocity(params)
    error = np.linalg.norm(velocity(packed) - plain) / np.linalg.norm(plain)
    assert 1e-3 < error < 0.2


def test_only_the_selected_kernels_are_packed(model):
    _, params = model
    packed = quantize_params(params, named("nvfp4"), dtype=jnp.bfloat16)
    linears = packed["blocks"]["self_attn"]
    assert {type(linears[name]["kernel"]) for name in "qkvo"} == {PackedKernel}
    rest = (packed["head"]["linear"]["kernel"], packed["blocks"]["ffn"]["up"]["bias"])
    assert all(x.dtype == jnp.bfloat16 for x in rest)
    chex.assert_trees_all_equal(quantize_params(params, named("none")), params)
    assert describe_kernels(packed) == (
        "20 matrices in NVFP4 (weights mse, activations mse); quantize: xla, matmul: xla",
    )


def test_a_policy_that_does_not_match_is_refused(model, branch):
    _, params = model
    with pytest.raises(ValueError, match="no kernel at blocks/nowhere/kernel"):
        quantize_params(params, named("nvfp4"), branches={"blocks/nowhere/kernel": branch})
    odd = {"up": {"kernel": jnp.zeros((2, 24, 32))}}
    with pytest.raises(ValueError, match=r"24 inputs.*blocks of 16"):
        quantize_params(odd, QuantPolicy("mine", ((".*", Format()),)))


def test_a_named_implementation_runs_or_raises(kernel):
    x, bias = normal(3, 7, INPUTS), jnp.zeros(OUTPUTS)
    weight = pack_kernel(kernel, Format()).weight
    results = {
        name: jax.jit(layer(PackedKernel(weight, implementation=name), 0).product)(x, bias)
        for name in ("auto", "xla", "reference")
    }
    np.testing.assert_array_equal(results["auto"], results["xla"])
    np.testing.assert_allclose(results["xla"], results["reference"], rtol=1e-5, atol=1e-5)
    with pytest.raises(Unsupported, match=r"needs Blackwell \(sm_100\).*implementation='xla'"):
        layer(PackedKernel(weight, implementation="mosaic"), 0).product(x, bias)


def test_the_5b_takes_three_gigabytes():
    """2.76 GB of packed kernels and 0.19 GB of other parameters; nothing is allocated here."""
    cfg = DiTConfig(param_dtype=jnp.bfloat16)
    _, shapes = abstract(lambda: DiT(cfg, rngs=nnx.Rngs(0)))
    packed = jax.eval_shape(
        lambda params: quantize_params(params, named("nvfp4"), dtype=jnp.bfloat16), shapes
    )
    sizes = resident_bytes(packed)
    assert sizes["packed"] == pytest.approx(2.76e9, rel=0.01)
    assert sum(sizes.values()) == pytest.approx(2.76e9 + 0.19e9, rel=0.01)
    (line,) = describe_kernels(packed)
    assert line.startswith("300 matrices in NVFP4")


@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_those_of_the_dequantized_product(kind, rank, dtype):
    """Also with a LoRA whose second matrix is zero, as at the start of its training."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, grad = (jax.random.normal(key, (24, 64)).astype(dtype) for key in keys[:2])
    kernel, bias = jax.random.normal(keys[2], (64, 64)), jnp.ones(64)
    packed = pack_kernel(kernel, Format(kind=kind))
    values = packed.dequantized(dtype).astype(jnp.float32)
    branch = None
    if rank:
        branch = LowRank(jax.random.normal(keys[3], (64, rank)), jnp.zeros((rank, 64)), 0.5)

    def product(x, branch, bias):
        return dataclasses.replace(packed, branch=branch).product(x, bias)

    def dequantized(x, branch, bias):
        y = x.astype(jnp.float32) @ values + bias
        return y if branch is None else y + (x.astype(jnp.float32) @ branch.a) @ branch.b * 0.5

    got = jax.vjp(product, x, branch, bias)[1](grad)
    want = jax.vjp(dequantized, x.astype(jnp.float32), branch, bias)[1](grad.astype(jnp.float32))
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = float(jnp.max(jnp.abs(b)))
        assert float(jnp.max(jnp.abs(a.astype(jnp.float32) - b))) <= tolerance * scale
    assert float(jnp.linalg.norm(want[0])) > 1


def test_a_packed_matrix_is_stored_row_by_row_in_any_layout():
    kernel = pack_kernel(jax.random.normal(jax.random.key(0), (2, 128, 192)), Format())
    tiled = dataclasses.replace(kernel, weight=with_scale_layout(kernel.weight, "tiles"))
    assert tiled.weight.scales.shape == (2, 2, 2, 32, 16)
    for name, array in packed_arrays(kernel).items():
        np.testing.assert_array_equal(packed_arrays(tiled)[name], array)
