"""Argument checks of the NVFP4 operations, and their choice of implementation."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.nvfp4 import api, dequantize, matmul, quantize, select_implementation


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 24), {}, "the contraction axis must be a multiple of 16, got 24; pad it with zeros"),
        ((24, 32), {"transpose": True}, "the contraction axis must be a multiple of 16, got 24"),
        ((4, 32), {"rule": "static_5"}, "rule 'static_5'; choose from static_6, static_4, mse"),
        ((4, 32), {"block_rows": 8}, "block_rows must be 1 or 16, got 8"),
        ((32,), {"block_rows": 16}, "x must have >= 2 axes"),
        ((2, 16, 32), {"transpose": True}, r"lead must be 1 to transpose .*, got 0"),
        ((2, 16, 32), {"lead": 1, "amax": jnp.ones(3)}, r"amax must have shape \(2,\).*got \(3,\)"),
        ((4, 32), {"implementation": "cudnn"}, "implementation 'cudnn'; choose from auto"),
    ],
)
def test_invalid_arguments_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        quantize(jnp.ones(shape), **options)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="needs floating-point values, got int32"):
        quantize(jnp.ones((4, 32), jnp.int32))


def test_auto_is_xla_until_the_kernels_have_run():
    for op in ("quantize", "dequantize", "matmul"):
        assert select_implementation(op) == "xla"
        assert select_implementation(op, implementation="reference") == "reference"
    with pytest.raises(ValueError, match="no op 'attention'"):
        select_implementation("attention")


def test_a_named_kernel_runs_or_gives_a_reason(monkeypatch):
    a = quantize(jnp.ones((16, 32)))
    for call in (
        lambda: quantize(jnp.ones((16, 32)), implementation="mosaic"),
        lambda: dequantize(a, implementation="mosaic"),
        lambda: matmul(a, a, implementation="mosaic"),
    ):
        with pytest.raises(Unsupported, match="; this is cpu: use "):
            call()
    monkeypatch.setattr(api, "platform", lambda: "gpu")
    monkeypatch.setattr(api, "capability", lambda: "9.0")
    with pytest.raises(Unsupported) as refusal:
        select_implementation("matmul", a, a, implementation="mosaic")
    assert str(refusal.value) == (
        "NVFP4 matmul needs Blackwell (sm_100); this is sm_90: use quant=fp8 or "
        "implementation='xla' (dequantizes)"
    )
    monkeypatch.setattr(api, "capability", lambda: "10.0")
    assert select_implementation("matmul", a, a, implementation="mosaic") == "mosaic"


def test_shapes_are_inferred_without_running():
    x = jax.ShapeDtypeStruct((3, 64, 48), jnp.bfloat16)
    a = jax.eval_shape(lambda x: quantize(x, lead=1, transpose=True, block_rows=16), x)
    assert (a.shape, a.scales.shape, a.amax.shape) == ((3, 48, 64), (3, 48, 4), (3,))


def test_quantization_raises_if_differentiated():
    """Its rounding would give silent zeros; the message names the remedies."""

    def single(x):
        return dequantize(api.quantize(x), jnp.float32).sum()

    def both(x):
        amax = jnp.float32(1)
        parts = api.quantize_both(x, amax, amax, hadamard=False)
        return sum(dequantize(part, jnp.float32).sum() for part in parts)

    x = jnp.ones((16, 16))
    for loss in (single, both):
        assert jnp.isfinite(loss(x))
        with pytest.raises(NotImplementedError, match=r"stop_gradient.*recipe\.product"):
            jax.grad(loss)(x)
        jax.grad(lambda x, loss=loss: loss(jax.lax.stop_gradient(x)) + x.sum())(x)
