"""Video files survive interrupts and keep their colours; bad input has clear error messages."""

import numpy as np
import pytest

from longlive_jax.io.video import Mp4Writer, iter_video, read_video, video_fps
from longlive_jax.spec import UserError


def clip(frames: int) -> np.ndarray:
    """A still red box and a moving blue one on grey, in [-1, 1]."""
    video = np.full((frames, 64, 96, 3), -0.4, np.float32)
    video[:, 8:40, 16:48] = (0.9, -0.9, -0.8)
    for i, image in enumerate(video):
        image[40:60, i : i + 20] = (-0.9, 0.2, 0.9)
    return video


def test_chunks_are_written_as_one_video(tmp_path):
    video = clip(61)
    with Mp4Writer(tmp_path / "new" / "a.mp4") as writer:
        writer.append(video[:29])
        writer.append(video[29:])
    assert writer.frames == 61 and writer.seconds == pytest.approx(61 / 24)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.mp4"]
    decoded = read_video(tmp_path / "new" / "a.mp4")
    assert decoded.shape == video.shape and decoded.dtype == np.float32
    assert np.abs(decoded - video).mean() < 0.03
    assert np.abs(decoded[30, 20, 30] - (0.9, -0.9, -0.8)).max() < 0.05
    assert video_fps(tmp_path / "new" / "a.mp4") == 24


def test_an_exception_leaves_a_playable_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), Mp4Writer(tmp_path / "a.mp4") as writer:
        writer.append(clip(29))
        raise KeyboardInterrupt
    assert len(read_video(tmp_path / "a.mp4")) == 29


def test_a_part_file_is_playable_while_it_is_written(tmp_path):
    writer = Mp4Writer(tmp_path / "a.mp4")
    for _ in range(5):
        writer.append(clip(48))
    assert len(read_video(writer.part)) >= writer.frames - 48
    writer.close()
    writer.close()
    assert len(read_video(tmp_path / "a.mp4")) == 240 and not writer.part.exists()


def test_without_frames_nothing_is_written_and_an_old_file_is_kept(tmp_path):
    (tmp_path / "a.mp4").write_text("old")
    with Mp4Writer(tmp_path / "a.mp4") as writer:
        writer.append(clip(0))
    assert (tmp_path / "a.mp4").read_text() == "old"


def test_invalid_frames_are_refused(tmp_path):
    with Mp4Writer(tmp_path / "a.mp4") as writer:
        with pytest.raises(ValueError, match="even sizes"):
            writer.append(np.zeros((1, 63, 96, 3), np.uint8))
        with pytest.raises(ValueError, match=r"\[f, h, w, 3\]"):
            writer.append(np.zeros((64, 96, 3), np.uint8))
        with pytest.raises(ValueError, match="not finite"):
            writer.append(np.full((1, 64, 96, 3), np.nan, np.float32))
        writer.append(clip(1))
        with pytest.raises(ValueError, match=r"must be \(64, 96\) like the video so far"):
            writer.append(np.zeros((1, 32, 96, 3), np.uint8))


def test_reading_resamples_and_resizes(tmp_path):
    with Mp4Writer(tmp_path / "a.mp4", fps=30) as writer:
        writer.append(clip(60))
    assert read_video(tmp_path / "a.mp4", fps=24, size=(32, 32)).shape == (48, 32, 32, 3)
    assert next(iter_video(tmp_path / "a.mp4")).dtype == np.uint8


def test_unreadable_videos_are_refused(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"a\.mp4 is not a readable video"):
        read_video(tmp_path / "a.mp4")
    with pytest.raises(UserError, match="does not exist"):
        read_video(tmp_path / "b.mp4")


def test_an_unwritable_folder_is_refused_before_the_first_frame(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Mp4Writer(tmp_path / "file" / "a.mp4")
