"""The quantize kernels in the interpreter: codes and scales equal the oracle's, without races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.nvfp4 import NVFP4, reference, with_scale_layout
from pallas_kernels.nvfp4.mosaic import launch, operands
from pallas_kernels.nvfp4.mosaic.quantize import quantize, quantize_both
from pallas_kernels.nvfp4.mosaic.statistics import statistics
from pallas_kernels.nvfp4.rounding import rounding_noise, seeds
from tests.pallas_kernels.interpreter import SIMULATED, no_races

KEY, OTHER = jax.random.split(jax.random.key(7))


def array(*shape: int, dtype=jnp.bfloat16) -> jax.Array:
    """Blocks of many magnitudes, one of them zero, and zeros of both signs."""
    x = jax.random.normal(jax.random.key(0), shape)
    x = x * jnp.exp(2 * jax.random.normal(jax.random.key(1), (*shape[:-1], 1)))
    x = x.at[..., :16, :16].set(0).at[..., 0, 1].set(-0.0) if x.ndim > 1 else x
    return x.astype(dtype)


def oracle(x, amax, key=None, transpose=False, **options) -> NVFP4:
    noise = None
    if key is not None:
        noise = rounding_noise(seeds(key), (jnp.swapaxes(x, -1, -2) if transpose else x).shape)
    return reference.quantize(
        x, amax=amax, lead=amax.ndim, noise=noise, transpose=transpose, **options
    )


def most(x, lead=0, transpose=False, hadamard=False, **_) -> jax.Array:
    return reference.max_abs(reference.transpose_and_rotate(x, transpose, hadamard), lead)


def assert_same(got: NVFP4, want: NVFP4) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = (np.asarray(x) for x in (a, b))
        np.testing.assert_array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}"))


CASES = {
    "mse": (array(33, 144), 0, {"rule": "mse"}),
    "static_6": (array(32, 64), 0, {"rule": "static_6"}),
    "squares, static": (array(24, 64), 0, {"rule": "static_6", "block_rows": 16}),
}
SLOW = {
    "rotated, stochastic": (
        array(3, 8, 128), 1, {"rule": "static_6", "hadamard": True, "key": KEY}
    ),
    "transposed, static": (array(16, 40), 0, {"rule": "static_4", "transpose": True}),
    "stochastic": (array(2, 9, 80), 1, {"rule": "mae", "key": KEY}),
    "rotated": (array(16, 128), 0, {"rule": "mse", "hadamard": True}),
    "transposed": (array(32, 40), 0, {"rule": "mse", "transpose": True}),
    "squares": (array(24, 64, dtype=jnp.float32), 0, {"rule": "mse", "block_rows": 16}),
    "static_4": (array(32, 64), 0, {"rule": "static_4"}),
    "mae": (array(33, 144), 0, {"rule": "mae"}),
    "abs_max": (array(33, 144), 0, {"rule": "abs_max"}),
    "one block": (array(16), 0, {"rule": "mse"}),
    "leading axes": (array(2, 3, 40, 32), 2, {"rule": "mse"}),
    "one amax per group of rows": (array(2, 3, 5, 32), 1, {"rule": "mse"}),
    "transposed, ragged": (
        array(2, 80, 200), 1, {"rule": "mse", "transpose": True, "hadamard": True, "key": KEY}
    ),
    "squares, stochastic": (array(40, 96), 0, {"rule": "mae", "block_rows": 16, "key": KEY}),
    "squares, abs_max": (array(32, 64), 0, {"rule": "abs_max", "block_rows": 16}),
    "squares, transposed": (
        array(2, 32, 2304), 1, {"rule": "mse", "block_rows": 16, "transpose": True, "key": KEY}
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=name) for name, case in CASES.items()),
        *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()),
    ],
)
def test_it_equals_the_oracle(case):
    x, lead, options = case
    shape = {name: options.get(name, False) for name in ("transpose", "hadamard")}
    amax = most(x, lead, **shape)
    with no_races(kernels=1):
        got = quantize(x, amax, interpret=SIMULATED, **options)
    assert_same(got, oracle(x, amax, **options))


@pytest.mark.parametrize(
    ("shape", "rule", "keys", "stochastic"),
    [
        pytest.param((64, 128), "static_6", (None, KEY), "unbiased", id="static"),
        pytest.param(
            (192, 128), "mse", (None, None), "unbiased", id="nearest", marks=pytest.mark.slow
        ),
        pytest.param(
            (64, 256), "mse", (KEY, OTHER), "unbiased", id="stochastic", marks=pytest.mark.slow
        ),
        pytest.param(
            (64, 128), "mae", (KEY, OTHER), "reference", id="published", marks=pytest.mark.slow
        ),
        pytest.param(
            (2, 64, 128), "mse", (None, KEY), "unbiased", id="stacked", marks=pytest.mark.slow
        ),
        pytest.param(
            (16, 80), "mse", (None, KEY), "unbiased", id="in two passes", marks=pytest.mark.slow
        ),
    ],
)
def test_both_in_one_pass(shape, rule, keys, stochastic):
    x = array(*shape)
    lead = x.ndim - 2
    amax, amax_t = most(x, lead), most(x, lead, transpose=True, hadamard=True)
    with no_races(kernels=2 if operands.refusal(*shape[-2:]) else 1):
        plain, transposed = quantize_both(
            x, amax, amax_t, rule=rule, keys=keys, stochastic=stochastic, interpret=SIMULATED
        )
    want = oracle(x, amax, keys[0], rule=rule, stochastic=stochastic)
    assert_same(plain, with_scale_layout(want, "tiles"))
    options = {"rule": rule, "stochastic": stochastic, "transpose": True, "hadamard": True}
    assert_same(transposed, with_scale_layout(oracle(x, amax_t, keys[1], **options), "tiles"))


@pytest.mark.parametrize("transpose", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_scale_tiles_of_one_operand(transpose):
    x = array(64, 128)
    amax = most(x)
    options = {"rule": "static_6", "transpose": transpose}
    with no_races(kernels=1):
        got = quantize(x, amax, scale_layout="tiles", interpret=SIMULATED, **options)
    assert_same(got, with_scale_layout(oracle(x, amax, **options), "tiles"))


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (80, 1040)])
def test_statistics_are_those_of_a_matrix_and_its_rotated_transpose(rows, columns):
    x = array(rows, columns)
    with no_races(kernels=1):
        amax, rotated, sums = statistics(x, hadamard=True, sums=True, interpret=SIMULATED)
    assert amax == most(x) and rotated == most(x, transpose=True, hadamard=True)
    np.testing.assert_allclose(sums, np.asarray(x, np.float64).sum(0), rtol=1e-5, atol=1e-4)


def test_statistics_of_nan_are_nan():
    x = array(16, 32).at[3, 5].set(jnp.nan)
    amax, rotated, sums = statistics(x, hadamard=False, sums=False, interpret=SIMULATED)
    assert jnp.isnan(amax) and jnp.isnan(rotated) and sums is None


def test_zeros_and_values_that_are_not_finite():
    """Two entries: one of zeros, and one that has a block with NaN and one with infinity."""
    x = array(2, 8, 64).at[0].set(0).at[1, 3, 5].set(jnp.nan).at[1, 5, 40].set(jnp.inf)
    amax = jnp.array([0.0, 8.0])
    with no_races(kernels=1):
        got = quantize(x, amax, rule="static_6", interpret=SIMULATED)
    want = oracle(x, amax, rule="static_6")
    np.testing.assert_array_equal(got.scales.view(jnp.uint8), want.scales.view(jnp.uint8))
    np.testing.assert_array_equal(got.codes[0].view(jnp.uint8), want.codes[0].view(jnp.uint8))
    assert int(jnp.isnan(got.scales.astype(jnp.float32)).sum()) == 2


def test_programs_cover_every_item_and_repeat_only_their_own():
    for length in (128, 129, 511, 512, 513, 1300):
        partition = launch.WorkPartition(length, 4)
        covered = np.zeros(length, int)
        for group in range(partition.groups):
            covered[min(group * 128, length - 128) :][:128] += 1
        assert covered.min() == 1 and partition.programs * 4 <= max(4, partition.groups)
        last = (partition.programs - 1) * 4  # first group of the last program, owner of overlaps
        assert length % 128 == 0 or partition.groups == 1 or last <= partition.groups - 2
    with pytest.raises(ValueError, match="length must be >= 128, the group size, got 100"):
        launch.WorkPartition(100, 4)


@pytest.mark.parametrize(
    ("shape", "amax", "options", "message"),
    [
        ((16, 40), (), {}, "contraction axis must be a multiple of 16, got 40"),
        ((40, 16), (), {"transpose": True}, "contraction axis must be a multiple of 16, got 40"),
        ((4, 16, 32), (3,), {}, r"amax must have the shape of leading axes .*, got \(3,\)"),
        ((16, 32), (), {"block_rows": 8}, "block_rows must be 1 or 16, got 8"),
    ],
)
def test_invalid_arguments_are_refused(shape, amax, options, message):
    x = jnp.ones(shape, jnp.bfloat16)
    with pytest.raises(ValueError, match=message):
        quantize(x, jnp.ones(amax), interpret=SIMULATED, **options)


def test_unsupported_devices_and_options_are_refused(monkeypatch):
    x = jnp.ones((16, 32), jnp.bfloat16)
    with pytest.raises(Unsupported, match="rotated NVFP4 squares have no kernel"):
        quantize(x, most(x), block_rows=16, hadamard=True, interpret=SIMULATED)
    if jax.default_backend() != "gpu":
        with pytest.raises(Unsupported, match="quantize kernel needs an NVIDIA GPU; this is cpu"):
            quantize(x, most(x))
    monkeypatch.setattr(launch, "platform", lambda: "gpu")
    monkeypatch.setattr(launch, "capability", lambda: "9.0")
    with pytest.raises(
        Unsupported, match=r"needs Blackwell \(sm_100\).*this is sm_90: use quant=f"
    ):
        quantize(x, most(x))
    monkeypatch.setattr(launch, "capability", lambda: "10.0")
    assert launch.refusal("quantize") is None
