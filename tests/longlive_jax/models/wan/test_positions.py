"""Rotary positions: exact at any frame, split into frame, row and column."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.models.wan.layers import sinusoid
from longlive_jax.models.wan.positions import (
    angles,
    apply_rope,
    frequencies,
    rope_angles,
    rope_rotation,
)

FRAMES = np.array([0, 1, 7, 1023, 1024, 65_537, 999_999, 1_000_000], np.int64)


def angle_error(got, want):
    """Distance on the circle, in radians."""
    return np.abs(np.angle(np.exp(1j * (np.asarray(got, np.float64) - want)))).max()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_angles_stay_exact_for_a_million_frames(dtype):
    freqs = frequencies(44)
    got = jax.jit(lambda pos: angles(pos, freqs))(FRAMES.astype(dtype))
    assert angle_error(got, FRAMES[:, None] * freqs) < 1e-6
    assert angle_error(angles(-FRAMES.astype(dtype), freqs), -FRAMES[:, None] * freqs) < 1e-6


def test_fractional_positions():
    pos = np.array([0.25, 3.5, 1000.75, -2.5], np.float32)
    freqs = frequencies(44)
    assert angle_error(angles(pos, freqs), pos.astype(np.float64)[:, None] * freqs) < 1e-6


def test_pairs_are_split_into_frame_row_and_column():
    pos = np.array([[5, 3, 2]], np.int32)
    axes = [p * frequencies(width) for p, width in zip(pos[0], (44, 42, 42), strict=True)]
    got = rope_angles(pos, 128)
    assert got.shape == (1, 64)
    assert angle_error(got[0], np.concatenate(axes)) < 1e-6


def test_rotation_is_a_complex_product_and_depends_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 2, 16))

    def rotated(x, frame):
        return apply_rope(x, rope_rotation(jnp.array([[frame, 1, 2]]), 16))

    pairs = np.asarray(q).reshape(1, 1, 2, 8, 2)
    angle = np.asarray(rope_angles(np.array([[9, 1, 2]], np.int32), 16))
    want = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle[:, None])
    got = np.asarray(rotated(q, 9)).reshape(pairs.shape)
    np.testing.assert_allclose(got[..., 0] + 1j * got[..., 1], want, atol=1e-6)
    near = jnp.sum(rotated(q, 12) * rotated(k, 4))
    far = jnp.sum(rotated(q, 1_000_008) * rotated(k, 1_000_000))
    np.testing.assert_allclose(near, far, rtol=1e-5)


def test_the_time_sinusoid_has_cosines_first():
    steps = np.array([0.0, 999.0, 702.7929], np.float32)
    got = sinusoid(jnp.asarray(steps), 256)
    angle = steps.astype(np.float64)[:, None] * 10_000.0 ** (-np.arange(128) / 128)
    want = np.concatenate([np.cos(angle), np.sin(angle)], -1)
    np.testing.assert_allclose(got, want, atol=1e-6)
