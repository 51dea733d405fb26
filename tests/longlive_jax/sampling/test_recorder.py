"""What lies on the disk after a recording, whole or broken off."""

import numpy as np
import pytest

from longlive_jax.io.video import read_video
from longlive_jax.sampling.recorder import Recording, file_name, segments
from longlive_jax.sampling.script import Shot, ShotScript
from longlive_jax.sampling.timeline import plan

SCRIPTS = [
    ShotScript((Shot("a", chunks=1), Shot("b", chunks=1, cut=False), Shot("c", chunks=2))),
    ShotScript((Shot("a", chunks=2),)),
]


def chunk(laid, i):
    frames = laid.frames(i + 1) - laid.frames(i)
    return np.full((2, frames, 32, 32, 3), 40 * i, np.uint8)


def test_segments_end_where_the_prompt_changes_or_a_cut_falls():
    laid = plan(SCRIPTS, chunk_frames=2)
    assert segments(laid, 0) == [(0, 5, "a"), (5, 13, "b"), (13, 29, "c")]
    assert segments(laid, 1) == [(0, 13, "a")]


def test_each_video_has_its_own_length(tmp_path):
    laid = plan(SCRIPTS, chunk_frames=2)
    with Recording(tmp_path, laid, ["one", "two"], latents=True) as recording:
        for i in range(laid.chunks):
            recording.append(chunk(laid, i), np.zeros((2, 2, 2, 2, 4)))
    assert len(read_video(tmp_path / "one.mp4")) == 29
    assert len(read_video(tmp_path / "two.mp4")) == 13
    assert np.load(tmp_path / "two.latents.npy").shape[0] == 4
    assert (tmp_path / "one.strip.png").exists()


def test_broken_off(tmp_path):
    laid = plan(SCRIPTS[0], chunk_frames=2)
    with pytest.raises(KeyboardInterrupt), Recording(tmp_path, laid, ["video"]) as recording:
        recording.append(chunk(laid, 0)[:1])
        raise KeyboardInterrupt
    assert len(read_video(tmp_path / "video.mp4")) == 5 and (tmp_path / "strip.png").exists()


def test_file_names_are_harmless():
    assert file_name("../a b/c", 3, True) == "003-a_b_c"
    assert file_name("", 3, True) == "003" and file_name("x", 0, False) == "video"
