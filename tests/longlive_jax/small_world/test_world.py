"""Sampling and rendering of small-world videos."""

import dataclasses
import itertools

import numpy as np
import pytest

from longlive_jax import small_world as sw
from longlive_jax.small_world.drawing import RADII


def _shot(**changes):
    subject = sw.Subject(
        changes.pop("shape", "circle"),
        changes.pop("colour", "red"),
        changes.pop("radius", 15.0),
        changes.pop("marker", "white"),
    )
    fields = {"background": "black", "motion": "right", "x": 30.0, "y": 30.0, "chunks": 2}
    return sw.ShotSpec(subject, **{**fields, **changes})


def test_frame_counts_follow_the_causal_layout():
    assert [sw.frame_count(k) for k in range(4)] == [0, 13, 29, 45]
    assert [sw.frame_count(k, 1) for k in range(4)] == [0, 1, 5, 9]
    assert [sw.chunk_count(f) for f in (1, 13, 14, 29, 30)] == [1, 1, 2, 2, 3]
    spec = sw.VideoSpec((_shot(chunks=1), _shot(chunks=2), _shot(chunks=1)))
    assert sw.frame_bounds(spec) == ((0, 13), (13, 45), (45, 61))
    assert sw.frame_bounds(spec, 2) == ((0, 5), (5, 21), (21, 29))
    assert sw.render(spec).shape == (61, sw.HEIGHT, sw.WIDTH, 3)


def test_the_same_seed_gives_the_same_video():
    a, b = (sw.sample_spec(np.random.default_rng(5), chunks=20) for _ in range(2))
    assert a == b
    np.testing.assert_array_equal(sw.render(a), sw.render(b))
    assert a != sw.sample_spec(np.random.default_rng(6), chunks=20)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_sampled_videos_satisfy_their_constraints(split):
    rng = np.random.default_rng(0)
    changed, returns = np.zeros(3, int), 0
    for _ in range(40):
        spec = sw.sample_spec(rng, chunks=24, split=split, shot_chunks=(3, 6))
        assert spec.chunks == 24 and all(3 <= s.chunks <= 6 for s in spec.shots)
        names: dict = {}
        for shot in spec.shots:
            combination = (shot.shape, shot.colour, shot.background, shot.motion)
            assert sw.held_out(*combination) == (split == "held_out")
            assert shot.subject.radius in RADII
            assert names.setdefault((shot.shape, shot.colour), shot.subject) == shot.subject
        assert len(names) <= 3
        for last, shot in itertools.pairwise(spec.shots):
            assert last.caption != shot.caption
            changed += [
                last.subject != shot.subject,
                last.background != shot.background,
                last.motion != shot.motion,
            ]
        order = [s.subject for s, _ in itertools.groupby(spec.shots, lambda s: s)]
        runs = [key for key, _ in itertools.groupby(order)]
        returns += len(runs) - len(set(runs))
    assert (changed > 20).all() and returns > 20


def test_every_cut_moves_the_subject():
    rng = np.random.default_rng(1)
    for _ in range(20):
        spec = sw.sample_spec(rng, chunks=16)
        bounds = sw.frame_bounds(spec)
        for (a, b), last, shot in zip(bounds[:-1], spec.shots[:-1], spec.shots[1:], strict=True):
            step = np.multiply(sw.MOTIONS[last.motion], sw.SPEED * (b - a))
            size = np.asarray([sw.WIDTH, sw.HEIGHT])
            gap = np.asarray([shot.x - last.x, shot.y - last.y]) - step
            assert np.hypot(*((gap + size / 2) % size - size / 2)) >= 16


def test_numbers_and_lengths_of_shots():
    rng = np.random.default_rng(2)
    assert len(sw.sample_spec(rng, chunks=2).shots) == 1
    assert len(sw.sample_spec(rng, chunks=20, shots=5).shots) == 5
    with pytest.raises(ValueError, match=r"shots of 5 to 6 chunks can add up to 7"):
        sw.sample_spec(rng, chunks=7, shot_chunks=(5, 6))
    with pytest.raises(ValueError, match=r"9 shots of 3 to 6"):
        sw.sample_spec(rng, chunks=20, shots=9)
    with pytest.raises(ValueError, match="chunks must be >= 1, got 0"):
        sw.sample_spec(rng, chunks=0)
    with pytest.raises(ValueError, match=r"max_subjects must be >= 2 .* got 1"):
        sw.sample_spec(rng, chunks=4, max_subjects=1)
    with pytest.raises(ValueError, match="split"):
        sw.sample_spec(rng, chunks=4, split="test")


def test_a_range_of_frames_equals_that_part_of_the_video():
    spec = sw.sample_spec(np.random.default_rng(3), chunks=16)
    video = sw.render(spec)
    for part in (slice(40, 70), slice(0, 1), slice(-5, None), slice(10, 60, 7)):
        np.testing.assert_array_equal(sw.render(spec, frames=part), video[part])
    long = sw.VideoSpec(tuple(_shot(chunks=6) for _ in range(15_000)))  # 16 hours
    assert sw.render(long, frames=slice(1_400_000, 1_400_002)).shape[0] == 2


def test_pixels():
    shot = _shot(x=30.0, y=20.0, motion="still", marker="cyan", chunks=1)
    frame = sw.render(sw.VideoSpec((shot,)))[0]
    assert frame.dtype == np.float32 and frame.min() >= -1 and frame.max() <= 1
    colours = {k: np.asarray(v) / 127.5 - 1 for k, v in {**sw.COLOURS, **sw.MARKERS}.items()}
    np.testing.assert_allclose(frame[20, 30], colours["cyan"], atol=1e-6)
    np.testing.assert_allclose(frame[20, 40], colours["red"], atol=1e-6)
    np.testing.assert_allclose(frame[60, 0], np.full(3, 16 / 127.5 - 1), atol=1e-6)


@pytest.mark.parametrize("shape", sw.SHAPES)
@pytest.mark.parametrize("motion", ["left", "right", "up", "down"])
def test_motion_wraps_around(shape, motion):
    """A subject moves 6 pixels in 4 frames, so frame 4 is frame 0 rolled by 6 pixels."""
    clip = sw.render(sw.VideoSpec((_shot(shape=shape, motion=motion, x=1.0, y=2.0),)))
    dx, dy = (int(6 * d) for d in sw.MOTIONS[motion])
    np.testing.assert_allclose(np.roll(clip[0], (dy, dx), (0, 1)), clip[4], atol=1e-5)
    assert np.abs(clip[1] - clip[0]).max() > 0.2


def test_shapes_are_distinct():
    pictures = [sw.render(sw.VideoSpec((_shot(shape=s, chunks=1),)))[0] for s in sw.SHAPES]
    for a, b in itertools.combinations(pictures, 2):
        assert (np.abs(a - b).max(-1) > 0.5).sum() > 100


def test_vae_clips():
    video, cover = sw.vae_clips(np.random.default_rng(4), 16, 9, 1.0)
    assert video.shape == (16, 9, sw.HEIGHT, sw.WIDTH, 3) and cover.shape == video.shape[:-1]
    assert video.dtype == cover.dtype == np.float32
    assert cover.min() == 0 and cover.max() == 1
    step = np.abs(np.diff(video, axis=1)).mean((2, 3, 4))
    assert set(step.argmax(1) + 1) == {1, 5}  # cuts are at the first frame of a latent
    plain, _ = sw.vae_clips(np.random.default_rng(4), 16, 9, 0.0)
    assert np.abs(np.diff(plain, axis=1)).mean((2, 3, 4)).max() < 0.06
    assert sw.vae_clips(np.random.default_rng(4), 3, 1)[0].shape[1] == 1
    again, _ = sw.vae_clips(np.random.default_rng(4), 16, 9, 1.0)
    np.testing.assert_array_equal(video, again)


def test_specs_are_immutable():
    spec = sw.sample_spec(np.random.default_rng(0), chunks=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.shots = ()


def test_subjects_are_on_the_grid_at_the_start_of_chunks():
    rng = np.random.default_rng(5)
    for _ in range(20):
        spec = sw.sample_spec(rng, chunks=12, shot_chunks=(2, 5))
        at = 0
        for shot in spec.shots:
            first = sw.frame_count(at)
            for chunk in range(max(at, 1), at + shot.chunks):
                moved = np.multiply(
                    sw.MOTIONS[shot.motion], sw.SPEED * (sw.frame_count(chunk) - first)
                )
                assert not ((np.array([shot.x, shot.y]) + moved) % 8).any()
            at += shot.chunks
