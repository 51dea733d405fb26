"""The dequantize kernels in the interpreter: values equal the oracle's, and there are no races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.nvfp4 import NVFP4, reference
from pallas_kernels.nvfp4.format import dequantize_reference
from pallas_kernels.nvfp4.mosaic.dequantize import dequantize, dequantize_slots
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


def test_less_than_a_group():
    a = packed(3, 16)
    with no_races(kernels=1):
        got = dequantize(a, interpret=SIMULATED)
    np.testing.assert_array_equal(got, dequantize_reference(a, jnp.bfloat16))


def test_only_listed_slots_are_read():
    """Slots that are not listed may hold NaN, and the list is a traced argument."""
    a = packed(4, 9, 2, 128, lead=1)
    broken = NVFP4(a.codes, a.scales, a.amax.at[jnp.array([1, 3])].set(jnp.nan), a.rule)
    slots = jnp.array([2, 0, 2])
    with no_races(kernels=1):
        got = jax.jit(lambda slots: dequantize_slots(broken, slots, interpret=SIMULATED))(slots)
    np.testing.assert_array_equal(got, dequantize_reference(a, jnp.bfloat16)[slots])


def test_unsupported_arguments_are_refused():
    a = packed(2, 16, 32)
    with pytest.raises(ValueError, match=r"amax must have shape \(2,\), one per slot, got \(\)"):
        dequantize_slots(a, jnp.array([0]), interpret=SIMULATED)
    with pytest.raises(ValueError, match="the kernel writes bfloat16 or float32"):
        dequantize(a, jnp.float16, interpret=SIMULATED)
    if jax.default_backend() != "gpu":
        with pytest.raises(Unsupported, match="dequantize kernel needs an NVIDIA GPU"):
            dequantize(a)
