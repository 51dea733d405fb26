"""Rounding against the casts of ml_dtypes, and the noise of stochastic rounding."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.nvfp4.reference import square, third
from pallas_kernels.nvfp4.rounding import (
    MAX_CODE,
    MAX_SCALE,
    rounding_noise,
    seeds,
    stochastic_round,
    to_nearest,
    to_scale,
)

HALFWAY = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)
STEPS = 1 << 16


def around(points):
    points = np.float32(points)
    return np.concatenate([points, np.nextafter(points, 0), np.nextafter(points, np.float32(1e9))])


def numbers(count, scale):
    return np.float32(np.random.default_rng(0).standard_normal(count) * scale)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["stepwise", "fused"])
def test_codes_round_as_casts_do(wrap):
    x = np.concatenate([around(HALFWAY), numbers(20_000, 3), [0, 6, 7, 100, np.inf]])
    x = np.concatenate([x, -x]).astype(np.float32)
    got = np.asarray(wrap(to_nearest)(x))
    want = np.clip(x, -MAX_CODE, MAX_CODE).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(x))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["stepwise", "fused"])
def test_scales_round_as_casts_do_and_saturate(wrap):
    exact = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    points = [around((exact[1:] + exact[:-1]) / 2), exact, np.abs(numbers(20_000, 9)), [1e-9, 1e9]]
    x = np.concatenate(points).astype(np.float32)
    want = np.minimum(x, MAX_SCALE).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(wrap(to_scale)(x), want)
    assert np.isnan(to_scale(jnp.float32(np.nan)))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["stepwise", "fused"])
def test_a_third_is_correctly_rounded(wrap):
    bits = np.random.default_rng(1).integers(0, 2**32, 200_000, dtype=np.uint32)
    x = bits.view(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) > 1e-30)]
    np.testing.assert_array_equal(wrap(third)(x), x / np.float32(3))


def test_squares_are_rounded_before_they_are_summed():
    x = numbers(30_000, 1)
    got = jax.jit(lambda x: square(x[:10_000]) + square(x[10_000:20_000]) - square(x[20_000:]))(x)
    a, b, c = (x * x).reshape(3, -1)
    np.testing.assert_array_equal(got, a + b - c)


@pytest.mark.parametrize("u", [0.0, 0.1, 0.3, -1.7, 1.999, 2.0, 2.25, -3.6, 4.0, 4.1, -5.9, 6.0])
def test_the_mean_over_all_noise_is_the_value(u):
    every = (jnp.arange(STEPS) + 0.5) / STEPS
    got = np.asarray(stochastic_round(jnp.full(STEPS, u, jnp.float32), every), np.float64)
    assert len(np.unique(np.abs(got))) <= 2
    step = 0.5 if abs(u) < 2 else 1 if abs(u) < 4 else 2
    assert abs(got.mean() - np.float32(u)) <= step / STEPS / 2 * 1.001
    if u in (0, 2, 4, 6):
        assert np.all(got == u)


def test_noise_is_uniform_and_independent():
    first, second = (np.asarray(d) for d in rounding_noise(seeds(jax.random.key(3)), (256, 1024)))
    count = first.size
    for x in (first, second):
        assert x.min() > 0 and x.max() < 1
        assert abs(x.mean() - 0.5) < 4 / np.sqrt(12 * count)
        counts = np.histogram(x, 256, (0, 1))[0]
        assert np.sum((counts - count / 256) ** 2) / (count / 256) < 255 + 6 * np.sqrt(2 * 255)
    other = np.asarray(rounding_noise(seeds(jax.random.key(4)), (256, 1024))[0])
    pairs = [
        (first, second),
        (first, other),
        (first[:, 1:], first[:, :-1]),
        (first[1:], first[:-1]),
    ]
    for a, b in [*pairs, (first[:, 16:], first[:, :-16])]:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)


def test_noise_depends_only_on_key_and_index():
    words = seeds(jax.random.key(3))
    tall, wide = rounding_noise(words, (2, 8, 32))[0], rounding_noise(words, (16, 32))[0]
    np.testing.assert_array_equal(np.asarray(tall).reshape(16, 32), wide)
    assert not np.array_equal(wide, rounding_noise(seeds(jax.random.key(4)), (16, 32))[0])
