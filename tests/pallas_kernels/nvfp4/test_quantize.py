"""Quantization: goldens and properties, for all implementations."""

from functools import partial

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.nvfp4 import LIMITS, RULES, dequantize, pack, quantize, rotate
from pallas_kernels.nvfp4.format import CODE_DTYPE, SCALE_DTYPE
from pallas_kernels.nvfp4.reference import max_abs

IMPLEMENTATIONS = {name: partial(quantize, implementation=name) for name in ("reference", "xla")}
"""The implementations of `quantize` that run without a GPU."""
SEARCHING = ("mse", "mae", "abs_max")
SMALLEST_NORMAL = 2.0**-6


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def matrix(value=0.0):
    """A constant matrix in the shape of the goldens, for which everything is compiled anyway."""
    return np.full((128, 256), value, jnp.bfloat16)


def values(a):
    return np.asarray(dequantize(a, jnp.float32))


def blocks(x):
    return np.asarray(x, np.float64).reshape(*x.shape[:-1], -1, 16)


def host(a, index=None):
    """The arrays on the host; `index` selects from those that have rows."""
    return jax.tree.map(lambda x: np.asarray(x)[... if index is None or not x.ndim else index], a)


def assert_same(a, b):
    assert a.rule == b.rule
    for x, y in zip(jax.tree.leaves(host(a)), jax.tree.leaves(host(b)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(np.signbit(x), np.signbit(y))


@pytest.fixture(params=IMPLEMENTATIONS)
def run(request):
    return IMPLEMENTATIONS[request.param]


@pytest.mark.parametrize("rows", [1, 16], ids=["1d", "2d"])
@pytest.mark.parametrize("rule", RULES)
def test_goldens_bit_for_bit(run, goldens, rule, rows):
    with np.load(goldens / "nvfp4_quantize.npz") as file:
        for name in ("normal", "heavy", "zeros_blocks"):
            a = run(jnp.asarray(file[f"{name}/x"], jnp.bfloat16), rule=rule, block_rows=rows)
            key = f"{name}/{rule}/{'1d' if rows == 1 else '2d'}"
            np.testing.assert_array_equal(pack(a.codes), file[f"{key}/codes"])
            bits = np.asarray(a.scales).view(np.uint8)
            np.testing.assert_array_equal(bits, file[f"{key}/scales_e4m3"])
            assert a.amax == file[f"{key}/amax"]
            assert np.all(np.float32(a.scales)[np.float32(a.scales) > 0] >= SMALLEST_NORMAL), (
                "no golden has a scale so small that the published code wraps"
            )


@pytest.mark.parametrize(
    ("rule", "rows", "error"),
    [
        ("static_6", 1, 9.06e-3),
        ("static_4", 1, 9.71e-3),
        ("mse", 1, 7.62e-3),
        ("mae", 1, 7.85e-3),
        ("abs_max", 1, 8.06e-3),
        ("static_6", 16, 1.244e-2),
        ("mse", 16, 1.235e-2),
    ],
)
def test_relative_error_of_normal_numbers(rule, rows, error):
    """The errors are as published within 2 %; they depend on `amax` relative to powers of two."""
    x = normal(1024, 1024)
    off = values(quantize(x, rule=rule, block_rows=rows)) - np.float32(x)
    assert np.mean(off**2) / np.mean(np.float32(x) ** 2) == pytest.approx(error, rel=0.02)


def matrices(smallest=0.0, most=2.0**100):
    """[4, 32] with zeros and values of all magnitudes that are normal in float32."""
    sizes = st.floats(max(smallest, 2.0**-100), most, width=32)
    signed = st.builds(lambda size, sign: size * sign, sizes, st.sampled_from([-1.0, 1.0]))
    return hnp.arrays(np.float32, (4, 32), elements=st.one_of(st.just(0.0), signed))


check = settings(deadline=None, max_examples=40)


@check
@given(matrices(), st.sampled_from(["static_6", "mse"]))
def test_quantizing_again_changes_nothing(x, rule):
    """The amax is the same, and only blocks whose scale is a normal number are compared."""
    a = quantize(jnp.asarray(x), rule=rule, amax=jnp.max(jnp.abs(x)))
    once = values(a)
    again = values(quantize(jnp.asarray(once), rule=rule, amax=a.amax))
    normal_scale = np.repeat(np.float32(a.scales) >= SMALLEST_NORMAL, 16, axis=-1)
    np.testing.assert_array_equal(again[normal_scale], once[normal_scale])


@check
@given(matrices(), st.sampled_from(RULES))
def test_signs_are_preserved(x, rule):
    a, b = (quantize(jnp.asarray(y), rule=rule) for y in (x, -x))
    np.testing.assert_array_equal(np.float32(b.codes), -np.float32(a.codes))
    np.testing.assert_array_equal(b.scales, a.scales)
    assert not np.any(np.signbit(np.float32(a.codes)) & (x >= 0)), "nothing positive becomes -0"


@check
@given(matrices(), st.sampled_from(RULES))
def test_the_error_is_less_than_a_step(x, rule):
    """The bound is half the widest step of codes plus what clips when the scale is rounded down;
    with a subnormal scale, a block's largest value may be 9 times the scale."""
    a = quantize(jnp.asarray(x), rule=rule)
    code, scale = LIMITS[rule]
    unit = float(a.amax) / (code * scale)
    peak = np.abs(blocks(x)).max(-1)
    limit = np.where(np.float32(a.scales) >= SMALLEST_NORMAL, peak / 5, 3 * unit * 2.0**-9)
    assert np.all(np.abs(blocks(values(a)) - blocks(x)).max(-1) <= limit * 1.01)


@check
@given(matrices(2.0**-20, 2.0**20), st.sampled_from(SEARCHING))
def test_the_better_scale_is_chosen_in_every_block(x, rule):
    """This test computes both candidates itself, for a largest code of 6 and of 4."""
    a = quantize(jnp.asarray(x), rule=rule)
    divisor, x = np.float32(6 * 256), blocks(x)
    grow = divisor / np.float32(a.amax) if a.amax else np.float32(0)
    peak = np.float32(np.abs(x).max(-1, keepdims=True))
    errors = []
    for factor in (1, 1.5):
        steps = np.float64((peak / np.float32(6) * grow * np.float32(factor)).astype(SCALE_DTYPE))
        step = steps * float(a.amax) / 1536
        coded = np.divide(x, step, out=np.zeros_like(x), where=steps > 0)
        errors.append(measured(off=to_code(coded) * step - x, rule=rule))
    error = measured(off=blocks(values(a)) - x, rule=rule)
    tiny = (1e-6 * float(a.amax)) ** (2 if rule == "mse" else 1)
    assert np.all(error <= np.minimum(*errors) * 1.001 + tiny)


def to_code(x):
    return np.clip(x, -6, 6).astype(CODE_DTYPE).astype(np.float64)


def measured(off, rule):
    if rule == "abs_max":
        return np.abs(off).max(-1)
    return (off**2 if rule == "mse" else np.abs(off)).sum(-1)


def test_zeros_stay_zeros(run):
    x = matrix()
    x[0, 0] = -0.0
    a = run(jnp.asarray(x))
    assert a.amax == 0 and not np.any(values(a))
    for leaf in (a.codes, a.scales):
        assert not np.any(np.float32(leaf)) and not np.any(np.signbit(np.float32(leaf)))


@pytest.mark.parametrize("rule", ["static_6", "mse"])
def test_blocks_beyond_the_smallest_scale_saturate(run, rule):
    """Rounding the scale down to 2**-9, from almost 1.5 times as much, turns 6 into almost 9, which
    the published code wraps to -0."""
    small = 1.45 * 2.0**-9 / LIMITS[rule][1]
    x = matrix()
    x[0, 0], x[0, 16:32] = 1.0, -small
    a = run(jnp.asarray(x), rule=rule)
    scale, codes = np.float32(a.scales)[0, 1], np.float32(a.codes)[0, 16:32]
    assert np.all(codes == (-6 if scale == 2.0**-9 else -4))
    np.testing.assert_allclose(values(a)[0, 16:32], -small, rtol=0.35)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_nan_and_infinity_dequantize_to_nan(run, bad):
    """The whole array is NaN if amax is that of x, only their block if amax is given."""
    x = matrix(0.75)
    x[1, 20] = bad
    assert np.all(np.isnan(values(run(jnp.asarray(x)))))
    got = values(run(jnp.asarray(x), amax=jnp.float32(5)))
    want = np.zeros(x.shape, bool)
    want[1, 16:32] = True
    np.testing.assert_array_equal(np.isnan(got), want)
    assert np.all(np.isfinite(got[~want]))


def test_a_given_amax_too_small_saturates(run):
    got = values(run(jnp.asarray(matrix(3.0)), amax=jnp.float32(0.1)))
    assert np.all(got == np.float32(0.1) / np.float32(6 * 256) * 6 * 448)


def test_amax_too_small_for_the_arithmetic_counts_as_zero(run):
    assert not np.any(values(run(jnp.asarray(matrix(1e-36)))))


def test_tiles_of_a_matrix_and_its_transpose_are_the_same():
    w = normal(64, 48)
    a, b = (host(quantize(w, block_rows=16, transpose=t)) for t in (False, True))
    np.testing.assert_array_equal(values(a).T, values(b))
    np.testing.assert_array_equal(a.codes.T, b.codes)
    np.testing.assert_array_equal(a.scales[::16], b.scales[::16].T)
    np.testing.assert_array_equal(np.repeat(a.scales[::16], 16, axis=0), a.scales)


def test_rows_that_do_not_fill_a_tile():
    x = normal(20, 32)
    a, b = (
        quantize(rows, rule="static_6", block_rows=16)
        for rows in (x, jnp.pad(x, ((0, 12), (0, 0))))
    )
    assert_same(a, host(b, np.s_[:20]))


@pytest.mark.parametrize("options", [{"block_rows": 16}, {"transpose": True, "hadamard": True}])
def test_leading_axes_have_an_amax_each(options):
    x = jnp.asarray(normal(3, 32, 48) * np.array([1, 128, 2.0**-7])[:, None, None], jnp.bfloat16)
    stacked = quantize(x, rule="static_6", lead=1, **options)
    assert stacked.amax.shape == (3,)
    for i in range(3):
        assert_same(host(stacked, np.s_[i]), quantize(x[i], rule="static_6", **options))


def test_transpose_and_rotation_come_first():
    x = normal(32, 48)
    rotated = quantize(x, rule="static_6", transpose=True, hadamard=True)
    assert_same(rotated, quantize(rotate(x.T), rule="static_6"))


def test_a_slice_with_the_full_amax_equals_the_slice_of_the_result():
    x = normal(16, 32)
    full = quantize(x, rule="static_6")
    part = quantize(x[:4], rule="static_6", amax=full.amax)
    assert_same(part, host(full, np.s_[:4]))


def test_vectors_and_more_axes():
    x = normal(2, 2, 4, 32)
    full = quantize(x, rule="static_6")
    row = quantize(x[0, 1, 2], rule="static_6", amax=full.amax)
    assert_same(row, host(full, np.s_[0, 1, 2]))


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "mse", "key": jax.random.key(1)},
        {"rule": "mae", "block_rows": 16, "transpose": True},
    ],
    ids=["stochastic", "tiles"],
)
def test_implementations_agree(options):
    x = normal(128, 256, seed=5) * np.exp(2 * np.float32(normal(128, 1, seed=6)))
    x = x.astype(jnp.bfloat16)
    first, *others = (run(x, **options) for run in IMPLEMENTATIONS.values())
    for other in others:
        assert_same(first, other)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [(16, 32), (128, 256), (64, 1000)])
def test_max_abs_is_nan_if_there_is_a_nan(shape, dtype):
    """XLA's floating-point maximum ignores it in some of these shapes."""
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    assert max_abs(jnp.asarray(x)) == np.abs(np.float32(x)).max()
    x[1, 20] = np.nan
    assert np.isnan(max_abs(jnp.asarray(x)))
    rows = np.asarray(max_abs(jnp.asarray(x), 1))
    np.testing.assert_array_equal(np.isnan(rows), np.arange(shape[0]) == 1)
