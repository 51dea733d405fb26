"""Frames of a video to continue: upright, by timestamps, of any size, and never a damaged one."""

import resource

import numpy as np
import pytest

from longlive_jax.io.video import read_frames, video_fps
from longlive_jax.spec import UserError
from tests.longlive_jax.data.clips.videos import cut_short, numbers, write_video


def test_frames_follow_the_timestamps_at_any_rate(tmp_path):
    stamps = [0, 0.1, 0.3, 0.34, 0.5, 1.0]
    path = write_video(tmp_path / "a.mp4", 6, 24, stamps=stamps, ahead=0)
    for fps in (12, 16, 24):
        frames = numbers(read_frames(path, fps=fps, size=(32, 64)))
        times = (np.arange(len(frames)) + 0.25) / fps
        assert frames == [max(k for k, at in enumerate(stamps) if at <= t) for t in times]


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_a_rotated_video_is_upright_at_its_own_size(tmp_path, degrees, turns):
    plain = read_frames(write_video(tmp_path / "a.mp4", 3))
    rotated = read_frames(write_video(tmp_path / "b.mp4", 3, rotation=degrees))
    assert plain.shape == (3, 32, 64, 3)
    np.testing.assert_array_equal(rotated, np.rot90(plain, turns, axes=(1, 2)))


def test_every_frame_is_kept(tmp_path):
    path = write_video(tmp_path / "a.mp4", 61)
    assert numbers(read_frames(path)) == list(range(61)) and video_fps(path) == 24


def test_a_video_that_is_cut_short_is_an_error_that_says_so(tmp_path):
    path = cut_short(write_video(tmp_path / "a.mp4", 96, options={"movflags": "faststart"}))
    with pytest.raises(UserError, match=r"cannot be read past .* says 4\.00 s; it is cut short"):
        read_frames(path)


def test_memory_is_that_of_the_frames_at_the_wanted_size(tmp_path):
    """150 frames of 720p are 415 MB."""
    path = write_video(tmp_path / "a.mp4", 150, size=(720, 1280))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_frames(path, fps=24, size=(64, 64)).shape == (150, 64, 64, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KiB
