"""What NVFP4 operations refuse, and which implementation serves them."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.nvfp4 import api, dequantize, matmul, quantize, which


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 24), {}, "the contraction axis has 24 entries, no multiple of 16; pad it with zeros"),
        ((24, 32), {"transpose": True}, "the contraction axis has 24 entries"),
        ((4, 32), {"rule": "static_5"}, "rule 'static_5'; choose from static_6, static_4, mse"),
        ((4, 32), {"block_rows": 8}, "blocks of 8 rows; they have 1 or 16"),
        ((32,), {"block_rows": 16}, "it needs 2 axes"),
        ((2, 16, 32), {"transpose": True}, "lead must be 1, it is 0"),
        ((2, 16, 32), {"lead": 1, "amax": jnp.ones(3)}, r"amax has shape \(3,\)"),
        ((4, 32), {"implementation": "cudnn"}, "implementation 'cudnn'; choose from auto"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        quantize(jnp.ones(shape), **options)


def test_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="NVFP4 of int32"):
        quantize(jnp.ones((4, 32), jnp.int32))


def test_auto_is_xla_until_the_kernels_have_run():
    for op in ("quantize", "dequantize", "matmul"):
        assert which(op) == "xla"
        assert which(op, implementation="reference") == "reference"
    with pytest.raises(ValueError, match="no op 'attention'"):
        which("attention")


def test_a_kernel_by_name_runs_or_says_why_not(monkeypatch):
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
        which("matmul", a, a, implementation="mosaic")
    assert str(refusal.value) == (
        "NVFP4 matmul needs Blackwell (sm_100); this is sm_90: use quant=fp8 or "
        "implementation='xla' (dequantizes)"
    )
    monkeypatch.setattr(api, "capability", lambda: "10.0")
    assert which("matmul", a, a, implementation="mosaic") == "mosaic"


def test_shapes_are_known_without_running():
    x = jax.ShapeDtypeStruct((3, 64, 48), jnp.bfloat16)
    a = jax.eval_shape(lambda x: quantize(x, lead=1, transpose=True, block_rows=16), x)
    assert (a.shape, a.scales.shape, a.amax.shape) == ((3, 48, 64), (3, 48, 4), (3,))
