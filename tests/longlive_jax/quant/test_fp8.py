"""FP8 kernels: exact products of the quantized operands, and casts that saturate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from longlive_jax.planning import deviceless
from longlive_jax.quant.fp8 import Fp8Kernel, dequantize_rows, matmul_rows, pack_fp8, quantize_rows
from longlive_jax.quant.low_rank import LowRank


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def test_rows_have_their_own_scale():
    x = normal(0, 6, 32) * 10.0 ** jnp.arange(-3, 3)[:, None]
    codes, scale = quantize_rows(x.at[0].set(0))
    assert codes.dtype == jnp.float8_e4m3fn and float(scale[0]) == 0
    np.testing.assert_array_equal(scale[1:], jnp.max(jnp.abs(x), axis=1)[1:] / 448)
    assert set(np.max(np.abs(np.asarray(codes, np.float32)), axis=1)) == {0.0, 448.0}
    back = dequantize_rows(codes, scale)
    # Half a unit in the last of three bits, or half of the smallest subnormal number.
    error = np.abs(back - x.at[0].set(0))
    assert np.all(error <= np.abs(x) / 16 + scale[:, None] * 2.0**-10)


def test_casts_saturate_and_round_to_even():
    x = jnp.array([[448.0, 464.0, 465.0, -448.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10]])
    want = np.asarray(x, np.float32).astype(ml_dtypes.float8_e4m3fn)
    codes, scale = quantize_rows(x.at[0, 1:3].set(448.0))
    assert float(scale[0]) == 1
    got = np.asarray(codes)
    np.testing.assert_array_equal(got[0, 3:].view(np.uint8), want[0, 3:].view(np.uint8))
    tiny = jnp.full((1, 4), 1e-38)  # its scale is subnormal, and x / scale beyond 448 or nothing
    assert np.isfinite(np.asarray(quantize_rows(tiny)[0], np.float32)).all()


def test_nan_affects_only_its_row():
    x = normal(0, 3, 16).at[1, 2].set(jnp.nan)
    y = matmul_rows(*quantize_rows(x), *quantize_rows(normal(1, 5, 16)), out_dtype=jnp.float32)
    np.testing.assert_array_equal(np.isnan(y).all(axis=1), [False, True, False])
    assert np.isfinite(y[0]).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_is_that_of_the_quantized_operands(dtype):
    kernel, bias = normal(0, 2, 48, 24), normal(1, 24)
    x = (3 * normal(2, 2, 5, 48)).astype(dtype)
    packed = pack_fp8(kernel)
    assert packed.shape == kernel.shape and packed.nbytes == kernel.size + 4 * 2 * 24
    rows = np.asarray(dequantize_rows(*quantize_rows(x)), np.float64)
    for i in range(2):
        got = jax.tree.map(lambda leaf: leaf[i], packed).product(x, bias)  # noqa: B023
        want = rows @ np.asarray(packed.dequantized()[i], np.float64) + np.asarray(bias)
        limit = 1e-5 if dtype == jnp.float32 else 2e-2
        assert got.dtype == dtype and got.shape == (2, 5, 24)
        assert np.abs(np.asarray(got, np.float64) - want).max() < limit * np.abs(want).max()


def test_a_branch_is_added():
    kernel, bias, x = normal(0, 48, 24), normal(1, 24), normal(2, 5, 48)
    packed, branch = pack_fp8(kernel), LowRank(normal(3, 48, 4), normal(4, 4, 24), 2.0)

    @jax.jit
    def both(x):
        adapted = Fp8Kernel(packed.codes, packed.scales, branch)
        return adapted.product(x, bias), packed.product(x, bias) + branch(x)

    np.testing.assert_allclose(*both(x), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(deviceless.refusal() is not None, reason=f"{deviceless.refusal()}")
def test_a_hopper_gpu_multiplies_in_fp8(repository):
    script = Path(__file__).with_name("compile_fp8.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    products = json.loads(done.stdout.splitlines()[-1])
    assert products["own"] == {"calls": [], "dots": [["f8e4m3fn", "f8e4m3fn"]]}
    assert "__cublas$lt$matmul$f8" in products["library"]["calls"]
