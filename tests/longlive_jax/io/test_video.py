"""Video files survive interrupts, keep their colours, and complain in sentences."""

import numpy as np
import pytest

from longlive_jax.io.video import Mp4Writer, check_writable, iter_video, read_video, video_fps
from longlive_jax.spec import UserError


def clip(frames: int) -> np.ndarray:
    """A red box on grey and a moving blue one, in [-1, 1]."""
    video = np.full((frames, 64, 96, 3), -0.4, np.float32)
    video[:, 8:40, 16:48] = (0.9, -0.9, -0.8)
    for i, image in enumerate(video):
        image[40:60, i : i + 20] = (-0.9, 0.2, 0.9)
    return video


def test_chunks_come_back_as_one_video(tmp_path):
    video = clip(61)
    with Mp4Writer(tmp_path / "new" / "a.mp4") as writer:
        writer.append(video[:29])
        writer.append(video[29:])
    assert writer.frames == 61 and writer.seconds == pytest.approx(61 / 24)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.mp4"]
    back = read_video(tmp_path / "new" / "a.mp4")
    assert back.shape == video.shape and back.dtype == np.float32
    assert np.abs(back - video).mean() < 0.03
    assert np.abs(back[30, 20, 30] - (0.9, -0.9, -0.8)).max() < 0.05
    assert video_fps(tmp_path / "new" / "a.mp4") == 24


def test_an_exception_leaves_a_playable_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), Mp4Writer(tmp_path / "a.mp4") as writer:
        writer.append(clip(29))
        raise KeyboardInterrupt
    assert len(read_video(tmp_path / "a.mp4")) == 29


def test_a_part_file_plays_while_it_grows(tmp_path):
    writer = Mp4Writer(tmp_path / "a.mp4")
    for _ in range(5):
        writer.append(clip(48))
    assert len(read_video(writer.part)) >= writer.frames - 48
    writer.close()
    writer.close()
    assert len(read_video(tmp_path / "a.mp4")) == 240 and not writer.part.exists()


def test_without_frames_nothing_is_written_and_an_old_file_stays(tmp_path):
    (tmp_path / "a.mp4").write_text("old")
    with Mp4Writer(tmp_path / "a.mp4") as writer:
        writer.append(clip(0))
    assert (tmp_path / "a.mp4").read_text() == "old"


def test_bad_frames(tmp_path):
    with Mp4Writer(tmp_path / "a.mp4") as writer:
        with pytest.raises(ValueError, match="even sizes"):
            writer.append(np.zeros((1, 63, 96, 3), np.uint8))
        with pytest.raises(ValueError, match=r"\[f, h, w, 3\]"):
            writer.append(np.zeros((64, 96, 3), np.uint8))
        with pytest.raises(ValueError, match="not finite"):
            writer.append(np.full((1, 64, 96, 3), np.nan, np.float32))
        writer.append(clip(1))
        with pytest.raises(ValueError, match="the video is"):
            writer.append(np.zeros((1, 32, 96, 3), np.uint8))


def test_reading_resamples_and_resizes(tmp_path):
    with Mp4Writer(tmp_path / "a.mp4", fps=30) as writer:
        writer.append(clip(60))
    assert read_video(tmp_path / "a.mp4", fps=24, size=(32, 32)).shape == (48, 32, 32, 3)
    assert next(iter_video(tmp_path / "a.mp4")).dtype == np.uint8


def test_unreadable_videos(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"a\.mp4 is no readable video"):
        read_video(tmp_path / "a.mp4")
    with pytest.raises(UserError, match="does not exist"):
        read_video(tmp_path / "b.mp4")


def test_unwritable_folders_are_found_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        check_writable(tmp_path / "file" / "out")
    with pytest.raises(UserError, match="cannot write"):
        Mp4Writer(tmp_path / "file" / "a.mp4")
    assert check_writable(tmp_path / "x" / "y").is_dir()
