"""The NVFP4 array as a pytree, its packed bytes, and the scale layout of tensor cores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.nvfp4 import (
    NVFP4,
    dequantize,
    pack,
    quantize,
    swizzle,
    unpack,
    unswizzle,
)
from pallas_kernels.nvfp4.format import CODE_DTYPE, SCALE_DTYPE

VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def layers(count=3, rows=8, k=32):
    return quantize(jax.random.normal(jax.random.key(0), (count, rows, k)), lead=1)


def test_codes_are_numbered_as_published():
    codes = unpack(jnp.arange(16, dtype=jnp.uint8) * 17)
    assert codes.dtype == CODE_DTYPE
    want = np.repeat([*VALUES, *(-np.float32(v) for v in VALUES)], 2)
    np.testing.assert_array_equal(np.float32(codes), want)
    np.testing.assert_array_equal(np.signbit(np.float32(codes)), np.arange(32) >= 16)


def test_the_low_half_of_a_byte_is_the_even_column():
    np.testing.assert_array_equal(
        pack(jnp.array([[1.0, 6.0, -0.5, 0.0]], CODE_DTYPE)), [[0x72, 0x09]]
    )
    with pytest.raises(ValueError, match="codes per row must be even, got 3"):
        pack(jnp.zeros((2, 3), CODE_DTYPE))


@settings(deadline=None, max_examples=20)
@given(st.binary(min_size=24, max_size=24))
def test_packing_is_lossless(raw):
    packed = np.frombuffer(raw, np.uint8).reshape(2, 3, 4)
    codes = unpack(packed)
    assert codes.shape == (2, 3, 8)
    np.testing.assert_array_equal(pack(codes), packed)
    np.testing.assert_array_equal(pack(np.asarray(codes)), packed)


@settings(deadline=None, max_examples=6)
@given(st.sampled_from([1, 32, 127, 128, 300]), st.sampled_from([1, 3, 4, 9]), st.booleans())
def test_swizzled_scales_have_the_layout_of_tensor_cores(rows, columns, stacked):
    scales = np.random.default_rng(rows * columns).integers(1, 127, (rows, columns), np.uint8)
    padded = -(-columns // 4) * 4
    want = np.zeros(-(-rows // 128) * 128 * padded, np.uint8)
    r, c = np.mgrid[:rows, :columns]
    tile = (r // 128) * (padded // 4) + c // 4
    want[tile * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4] = scales
    e4m3 = jnp.asarray(scales).view(SCALE_DTYPE)
    flat = swizzle(e4m3[None] if stacked else e4m3)
    np.testing.assert_array_equal(np.asarray(flat).view(np.uint8).reshape(want.shape), want)
    back = unswizzle(flat, rows, columns)
    assert back.shape == ((1, rows, columns) if stacked else (rows, columns))
    np.testing.assert_array_equal(np.asarray(back).view(np.uint8).reshape(scales.shape), scales)


def test_scales_of_another_shape_are_refused():
    flat = swizzle(jnp.zeros((128, 4)))
    with pytest.raises(ValueError, match="129 rows of 4 blocks need 1024 scales, got 512"):
        unswizzle(flat, 129, 4)


def test_bytes_and_shape():
    a = layers(3, 8, 32)
    assert (a.shape, a.ndim, a.size, a.lead, len(a)) == ((3, 8, 32), 3, 768, 1, 3)
    assert a.nbytes == 768 // 2 + 768 // 16 + 3 * 4
    abstract = jax.eval_shape(lambda: layers(3, 8, 32))
    assert isinstance(abstract, NVFP4) and abstract.nbytes == a.nbytes and abstract.rule == "mse"


def test_layers_are_scanned_gathered_and_sliced():
    a = layers()
    want = np.asarray(dequantize(a, jnp.float32))
    _, scanned = jax.lax.scan(lambda c, layer: (c, dequantize(layer, jnp.float32)), 0, a)
    np.testing.assert_array_equal(scanned, want)
    order = jnp.array([2, 0])
    gathered = jax.tree.map(lambda leaf: leaf[order], a)
    np.testing.assert_array_equal(dequantize(gathered, jnp.float32), want[[2, 0]])
    last = jax.tree.map(lambda leaf: leaf[-1], a)
    assert last.shape == (8, 32) and last.lead == 0
    np.testing.assert_array_equal(dequantize(last, jnp.float32), want[-1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dequantized_values_are_rounded_once(dtype):
    a = layers()
    units = np.float32(a.codes).reshape(3, 8, 2, 16) * np.float32(a.scales)[..., None]
    unit = np.asarray(a.amax) / np.float32(6 * 256)
    want = (units * unit[:, None, None, None]).astype(np.float32).reshape(3, 8, 32).astype(dtype)
    for implementation in ("reference", "xla"):
        got = dequantize(a, dtype, implementation=implementation)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, want)
