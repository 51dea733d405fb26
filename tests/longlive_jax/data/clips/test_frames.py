"""Runs of frames drawn from the videos of a dataset."""

import numpy as np
import pytest

from longlive_jax.data.clips import frames as module
from longlive_jax.data.clips.frames import FrameRuns
from longlive_jax.spec import UserError
from tests.longlive_jax.data.clips.videos import numbers, write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "flat"
    for name, length in (("a", 10), ("b", 30)):
        write_video(folder / f"{name}.mp4", length)
        (folder / f"{name}.txt").write_text("columns")
    return folder


def test_runs_are_consecutive_frames_of_shots_that_are_long_enough(folder):
    runs = FrameRuns.read(folder, (32, 64))
    assert [len(shot) for shot in runs.shots] == [10, 30]
    video = runs.draw(np.random.default_rng(0), 6, 13)
    assert video.shape == (6, 13, 32, 64, 3) and video.dtype == np.float32
    assert video.min() >= -1 and video.max() <= 1
    starts = set()
    for run in video:
        index = numbers(((run + 1) * 127.5).astype(np.uint8))
        assert index == list(range(index[0], index[0] + 13))
        starts.add(index[0])
    assert len(starts) > 1 and max(starts) <= 17
    np.testing.assert_array_equal(video, runs.draw(np.random.default_rng(0), 6, 13))


def test_videos_that_are_too_short_or_too_many(folder, monkeypatch):
    with pytest.raises(UserError, match="must have >= 31 frames at 24 fps, the longest has 30"):
        FrameRuns.read(folder, (32, 64)).check_length(31)
    monkeypatch.setattr(module, "MAX_BYTES", 40 * 32 * 64 * 3 - 1)
    with pytest.raises(UserError, match="use fewer videos"):
        FrameRuns.read(folder, (32, 64))
