"""The dequantize kernels in the interpreter: values equal the oracle's, and there are no races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.nvfp4 import NVFP4, reference
from pallas_kernels.nvfp4.format import dequantize_reference
from pallas_kernels.nvfp4.mosaic.dequantize import dequantize
from tests.pallas_kernels.interpreter import SIMULATED, no_races


def packed(*shape: int, lead: int = 0, rule="mse") -> NVFP4:
    return reference.quantize(jax.random.normal(jax.random.key(0), shape), lead=lead, rule=rule)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_equals_the_oracle(dtype):
    a = packed(2, 37, 128, lead=1, rule="static_6")
    with no_races(kernels=1):
        got = dequantize(a, jnp.dtype(dtype), interpret=SIMULATED)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, dequantize_reference(a, jnp.dtype(dtype)))


@pytest.mark.parametrize("shape", [(2, 1, 1, 8, 128), (2, 1, 7, 8, 1), (2, 1, 7, 8, 128)])
def test_an_offset_is_added_before_the_only_rounding(shape):
    """By the kernel where it repeats from token to token, else by XLA."""
    a = packed(2, 1, 7, 8, 128, lead=2)
    offset = jax.random.normal(jax.random.key(1), shape).astype(jnp.bfloat16)
    with no_races(kernels=1):
        got = dequantize(a, offset=offset, interpret=SIMULATED)
    want = dequantize_reference(a, jnp.float32) + offset.astype(jnp.float32)
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def test_less_than_a_group():
    a = packed(3, 16)
    with no_races(kernels=1):
        got = dequantize(a, interpret=SIMULATED)
    np.testing.assert_array_equal(got, dequantize_reference(a, jnp.bfloat16))


def test_unsupported_arguments_are_refused():
    a = packed(2, 16, 32)
    with pytest.raises(ValueError, match="the kernel writes bfloat16 or float32"):
        dequantize(a, jnp.float16, interpret=SIMULATED)
    if jax.default_backend() != "gpu":
        with pytest.raises(Unsupported, match="dequantize kernel needs an NVIDIA GPU"):
            dequantize(a)
