"""Video files survive interrupts and keep their colours; bad input has clear error messages."""

import resource
import signal
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from longlive_jax.io.video import (
    GifWriter,
    Mp4Writer,
    PngWriter,
    WebmWriter,
    parse_formats,
    read_frames,
    read_video,
    video_fps,
    write_video,
)
from longlive_jax.spec import Failure, UserError

TAGS = {"title": "t", "comment": '{"seed": 3}', "description": "AI-generated", "encoder": "ours"}


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


@pytest.mark.parametrize("writer", [Mp4Writer, WebmWriter, GifWriter])
def test_an_interrupt_of_the_first_frame_leaves_nothing(tmp_path, writer, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_encode", interrupted)
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / f"a{writer.suffix}") as video:
        video.append(clip(4))
    assert not list(tmp_path.iterdir())


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
    assert read_frames(tmp_path / "a.mp4").dtype == np.uint8


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


# --- Formats ---


@pytest.mark.parametrize(("writer", "name"), [(Mp4Writer, "a.mp4"), (WebmWriter, "a.webm")])
def test_tags_are_those_at_the_end(tmp_path, writer, name):
    """The part file has the first ones, for a process that is killed."""
    with writer(tmp_path / name, metadata={"title": "early"}) as video:
        video.append(clip(48))
        video.metadata = TAGS
    with av.open(str(tmp_path / name)) as file:
        tags = {key.lower(): value for key, value in file.metadata.items()}
        assert sum(1 for _ in file.decode(video=0)) == 48
    tags["encoder"] = tags.get("encoded_by", tags["encoder"])
    assert {key: tags[key] for key in TAGS} == TAGS
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_webm_keeps_frames_and_colours(tmp_path):
    video = clip(30)
    with WebmWriter(tmp_path / "a.webm") as writer:
        writer.append(video[:13])
        writer.append(video[13:])
    decoded = read_video(tmp_path / "a.webm")
    assert decoded.shape == video.shape and np.abs(decoded - video).mean() < 0.03


@pytest.mark.parametrize("writer", [WebmWriter, GifWriter])
def test_other_part_files_are_playable_while_they_are_written(tmp_path, writer):
    video = writer(tmp_path / f"a{writer.suffix}")
    for _ in range(4):
        video.append(clip(48))
    with av.open(str(video.part)) as file:
        seconds = max(frame.time for frame in file.decode(video=0))
    assert seconds > 6
    video.close()


def test_gif_loops_at_half_the_rate_with_a_comment(tmp_path):
    video = clip(61)
    with GifWriter(tmp_path / "a.gif", metadata=TAGS) as writer:
        writer.append(video[:13])  # an odd number: the next chunk goes on with its second frame
        writer.append(video[13:])
    assert writer.frames == 61
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 31 and gif.info["loop"] == 0
        durations, images = [], []
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
            images.append(np.asarray(gif.convert("RGB")) / 127.5 - 1)
    assert sum(durations) == pytest.approx(61 / 24 * 1000, abs=90)
    assert np.abs(np.stack(images) - video[::2]).mean() < 0.03
    comment = (tmp_path / "a.gif").read_bytes()
    assert b'comment: {"seed": 3}' in comment and comment.endswith(b"\0;")


def test_gif_keeps_the_colour_of_a_small_part(tmp_path):
    """Median cut by area alone would give it the background's."""
    frames = np.full((8, 64, 64, 3), (120, 130, 140), np.uint8)
    frames[..., 0] += np.random.default_rng(0).integers(0, 60, (8, 64, 64), dtype=np.uint8)
    frames[:, 30:34, 30:34] = (0, 220, 230)
    with GifWriter(tmp_path / "a.gif", colours=16) as writer:
        writer.append(frames)
    with Image.open(tmp_path / "a.gif") as gif:
        pixel = np.asarray(gif.convert("RGB"))[32, 32]
    assert np.abs(pixel.astype(int) - (0, 220, 230)).max() < 20


def test_png_frames_replace_those_of_a_longer_video(tmp_path):
    folder = tmp_path / "a.frames"
    folder.mkdir()
    for name in ("000007.png", "mine.png"):
        (folder / name).write_text("old")
    with PngWriter(folder, metadata=TAGS) as writer:
        writer.append(clip(2))
    assert sorted(p.name for p in folder.iterdir()) == ["000000.png", "000001.png", "mine.png"]
    with Image.open(folder / "000001.png") as image:
        assert image.text["Description"] == "AI-generated" and image.size == (96, 64)


def test_formats_by_name():
    assert parse_formats("mp4, GIF,mp4") == ("mp4", "gif")
    for text, message in (
        ("avi", "unknown format 'avi'; known: gif, mp4, png, webm$"),
        ("mp4,", "unknown format ''; known: gif, mp4"),
        ("gfi", "did you mean 'gif'"),
    ):
        with pytest.raises(UserError, match=message):
            parse_formats(text)


@pytest.mark.parametrize(
    ("writer", "limit"), [(Mp4Writer, 500_000), (GifWriter, 500_000), (PngWriter, 5_000)]
)
def test_a_full_disk_is_one_line_and_the_part_stays(tmp_path, writer, limit):
    """A limit on the size of files stands for the full disk: writing fails in the same way."""
    frames = np.random.default_rng(0).integers(0, 255, (24, 64, 64, 3), dtype=np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    name = f"a{writer.suffix}"
    try:
        video = writer(tmp_path / name)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        with pytest.raises(Failure, match=r"cannot be written \(File too large\)") as error, video:
            for _ in range(40):
                video.append(frames)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value) and str(video.part) in str(error.value)
    assert video.part.exists()
    if writer is Mp4Writer:  # to its end, without an error
        assert 24 <= len(read_video(video.part)) <= video.frames


# --- write_video ---


@pytest.mark.parametrize("name", ["a.mp4", "b/a.webm", "a.gif"])
def test_write_video_chooses_by_suffix(tmp_path, name):
    path = write_video(tmp_path / name, clip(8)[None], fps=12, metadata=TAGS)
    with av.open(str(path)) as file:
        assert sum(1 for _ in file.decode(video=0)) == 8
        assert file.streams.video[0].average_rate == pytest.approx(Fraction(12), abs=0.6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, clip(1)), TypeError, "path must be a string or a Path, got int"),
        (("a.avi", clip(1)), UserError, r"path must end in .mp4, .webm or .gif, got 'a.avi'"),
        (("a.mp4", clip(1)[0]), UserError, r"frames must be \[f, h, w, 3\]"),
        (("a.mp4", clip(0)), UserError, "with at least one frame"),
        (("a.mp4", np.zeros((2, 1, 32, 32, 3))), UserError, "frames has 2 videos"),
        (("a.mp4", np.zeros((1, 32, 32, 3), int)), TypeError, "frames must be uint8, .* got int64"),
        (("a.mp4", ["x"]), TypeError, "frames must be uint8"),
        (("a.mp4", clip(1) * 255), UserError, "must be in .-1, 1., or uint8"),
        (("a.mp4", clip(1) * np.nan), UserError, "frames must be finite"),
        (("a.mp4", clip(1)[:, :63]), UserError, "even sizes, got 63x96"),
        (("a.mp4", clip(1), 0), UserError, "fps must be in"),
        (("a.mp4", clip(1), "24"), TypeError, "fps must be a number, got str"),
    ],
)
def test_write_video_names_the_wrong_argument(arguments, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        write_video(*arguments)
    assert not list(tmp_path.iterdir())
