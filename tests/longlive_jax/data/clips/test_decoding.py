"""Decoding real files: frame rates, sizes, kinds of damage, and parts of a video."""

import math
import os

import av
import numpy as np
import pytest

from longlive_jax.data.clips.dataset import SourceShot, Unusable
from longlive_jax.data.clips.decoding import (
    check_first_frame,
    probe,
    read_frames,
    shot_length,
    verify,
)
from tests.longlive_jax.data.clips.videos import cut_short, numbers, write_silence, write_video

SIZE = (32, 64)


def read_all(path, size=SIZE, **shot):
    shot = SourceShot(path, "", **shot)
    return read_frames(shot, range(shot_length(shot)), size)


@pytest.mark.parametrize(
    ("fps", "frames", "expected"),
    [
        (12, 5, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
        (24, 7, [0, 1, 2, 3, 4, 5, 6]),
        (25, 27, [*range(18), *range(19, 27)]),
        (30, 11, [0, 1, 2, 4, 5, 6, 7, 9, 10]),
        (60, 11, [0, 3, 5, 8, 10]),
        (24000 / 1001, 31, [*range(31)]),
        (48, 9, [0, 2, 4, 6, 8]),
    ],
)
def test_every_frame_rate_becomes_24(tmp_path, fps, frames, expected):
    path = write_video(tmp_path / "a.mp4", frames, fps)
    assert numbers(read_all(path)) == expected
    info = probe(path)
    assert float(info.seconds) == pytest.approx(frames / fps, abs=2e-3)
    assert float(info.rate) == pytest.approx(fps) and (info.height, info.width) == SIZE


def test_variable_frame_rate_follows_the_timestamps(tmp_path):
    stamps = [0, 0.1, 0.3, 0.34, 0.5, 1.0]
    path = write_video(tmp_path / "a.mp4", 6, 24, stamps=stamps, ahead=0)
    frames = numbers(read_all(path))
    times = (np.arange(len(frames)) + 0.25) / 24
    assert frames == [max(k for k, at in enumerate(stamps) if at <= t) for t in times]
    assert len(frames) >= 25


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.avi", "a.mov"])
def test_containers_and_rounded_timestamps(tmp_path, name):
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4"}.get(name, "libx264")
    path = write_video(tmp_path / name, 29, codec=codec)
    assert numbers(read_all(path)) == list(range(29))
    verify(path, decode=True)


def test_length_ignores_a_longer_audio_stream(tmp_path):
    path = write_video(tmp_path / "a.mp4", 29, audio=True)
    assert numbers(read_all(path)) == list(range(29))
    verify(path)


def test_part_of_a_video_equals_the_same_frames_of_all(tmp_path):
    path = write_video(tmp_path / "a.mp4", 120, 30, gop=7)
    video = read_all(path)
    assert len(video) == 96
    for first in range(0, 96, 5):
        shot = SourceShot(path, "")
        frames = [i for i in range(first, min(first + 9, 96)) for _ in range(1 + (i == first + 2))]
        np.testing.assert_array_equal(read_frames(shot, frames, SIZE), video[frames])


def test_only_the_needed_part_is_decoded(tmp_path):
    """Damage to all frames except 23 around those that are read does no harm."""
    path = write_video(tmp_path / "a.mp4", 240, gop=12)
    shot, content = SourceShot(path, ""), bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        for packet in file.demux(stream):
            if packet.size and not 144 <= packet.pts * stream.time_base * 24 < 167:
                content[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(content)
    assert numbers(read_frames(shot, range(150, 160), SIZE)) == list(range(150, 160))
    for frames in (range(130, 140), range(160, 170)):
        with pytest.raises(Unusable):
            read_frames(shot, frames, SIZE)


class LateSeeking:
    """A container whose index is wrong: it seeks one second too far."""

    def __init__(self, container):
        self._container, self.seeks = container, 0

    def __enter__(self):
        self._container.__enter__()
        return self

    def __exit__(self, *error):
        return self._container.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self._container, name)

    def seek(self, offset, *, stream):
        self.seeks += 1
        self._container.seek(offset + round(1 / stream.time_base), stream=stream)


def test_file_whose_index_points_past_the_frame_is_read_from_its_start(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 90, gop=6)
    opened, open_file = [], av.open

    def open_late_seeking(file):
        opened.append(LateSeeking(open_file(file)))
        return opened[-1]

    monkeypatch.setattr(av, "open", open_late_seeking)
    frames = range(40, 45)
    assert numbers(read_frames(SourceShot(path, ""), frames, SIZE)) == list(frames)
    assert sum(file.seeks for file in opened) == 1


def test_start_and_end_of_a_shot(tmp_path):
    path = write_video(tmp_path / "a.mp4", 60)
    assert numbers(read_all(path, start=0.5, end=1.0)) == list(range(12, 24))
    assert numbers(read_all(path, start=2.0)) == list(range(48, 60))
    assert numbers(read_all(path, start=2.0, end=99.0)) == list(range(48, 60))
    with pytest.raises(Unusable, match=r"starts at 3 s, but the video lasts 2\.50 s"):
        shot_length(SourceShot(path, "", start=3.0))


@pytest.mark.parametrize("source", [(32, 64), (90, 160), (31, 63), (33, 121), (100, 40)])
@pytest.mark.parametrize("size", [(32, 64), (48, 32)])
def test_frames_keep_their_aspect_ratio_and_are_cropped_at_the_centre(tmp_path, source, size):
    """An edge between two columns is where uniform scaling and central cropping put it."""
    path = write_video(tmp_path / "a.mp4", 1, size=source)
    assert read_all(path, size).shape == (1, *size, 3)
    scale = max(size[0] / source[0], size[1] / source[1])
    column = math.ceil(source[1] / 8)
    frames = np.zeros((1, *source, 3), np.uint8)
    frames[:, :, 4 * column :] = 255
    expected = (4 * column - source[1] / 2) * scale + size[1] / 2
    dark = _written_and_read(tmp_path / "b.mp4", frames, size)[0, size[0] // 2, :, 0] < 128
    assert dark.sum() == pytest.approx(expected, abs=1.5)


def _written_and_read(path, frames, size):
    """Writes a video of `frames[0]` and reads it back at `size`."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=24)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(frames[0], format="rgb24")))
        file.mux(stream.encode(None))
    return read_all(path, size)


def test_rotated_video_is_upright(tmp_path):
    plain = read_all(write_video(tmp_path / "a.mp4", 3))
    for degrees, turns in ((90, 1), (180, 2), (-90, 3)):
        path = write_video(tmp_path / f"{turns}.mp4", 3, rotation=degrees)
        size = SIZE[::-1] if turns % 2 else SIZE
        np.testing.assert_array_equal(read_all(path, size), np.rot90(plain, turns, axes=(1, 2)))


def test_pixels_that_are_not_square(tmp_path):
    """32x64 pixels that are twice as high as wide are a square frame."""
    path = write_video(tmp_path / "a.mp4", 1, stretch="1/2")
    assert probe(path).stretch == 0.5
    square = read_all(path, (32, 32))
    plain = read_all(write_video(tmp_path / "b.mp4", 1), (32, 64))
    assert np.abs(square[0, 16, :, 0] - plain[0, 16, ::2, 0].astype(int)).mean() < 30


def test_colours_are_preserved(tmp_path):
    frames = np.zeros((1, 32, 64, 3), np.uint8)
    frames[:] = (200, 40, 90)
    read = _written_and_read(tmp_path / "a.mp4", frames, SIZE)
    assert np.abs(read.astype(int) - frames).max() <= 6


def test_truncated_file_with_its_index_first(tmp_path):
    """Its header still states the full length, and the remaining frames can be read."""
    options = {"movflags": "faststart"}
    path = cut_short(write_video(tmp_path / "a.mp4", 96, options=options, gop=12))
    assert shot_length(SourceShot(path, "")) == 96
    with pytest.raises(Unusable, match=r"a.mp4: cannot be read past .* says 4.00 s; it is cut"):
        read_all(path)
    assert numbers(read_frames(SourceShot(path, ""), range(10), SIZE)) == list(range(10))
    for decode in (False, True):
        with pytest.raises(Unusable, match="cut short"):
            verify(path, decode=decode)


@pytest.mark.parametrize("use", [probe, verify])
def test_header_with_more_frames_than_the_file_has_bytes(tmp_path, use):
    """If trusted, it would mean two years of video."""
    path = write_video(tmp_path / "a.avi", 40, codec="mpeg4")
    content = bytearray(path.read_bytes())
    for at in (content.index(b"strh") + 40, content.index(b"avih") + 24):
        content[at : at + 4] = (0x7FFFFFF0).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(Unusable, match=r"a\.avi: cannot be read past 1\.67 s"):
        use(path)


def test_still_picture_with_more_frames_than_bytes(tmp_path):
    path = write_video(tmp_path / "a.mp4", 2, stamps=[0, 3600], ahead=0)
    assert path.stat().st_size < 3600 * 24
    assert probe(path).seconds > 3599


def test_check_fits_decodes_one_frame(tmp_path):
    path = write_video(tmp_path / "a.mp4", 30, size=(200, 20), rotation=90)
    check_first_frame(SourceShot(path, "", start=0.5), (20, 200))
    with pytest.raises(
        Unusable, match=r"a\.mp4: the shape of 200x20 pixels is too far from 20x200"
    ):
        check_first_frame(SourceShot(path, ""), (200, 20))


def test_decoding_detects_damage_in_the_middle(tmp_path):
    path = write_video(tmp_path / "a.mp4", 96, gop=12)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400)
    path.write_bytes(content)
    with pytest.raises(Unusable, match=r"a\.mp4: "):
        verify(path, decode=True)


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "no index", "audio only", "folder"])
def test_files_that_are_not_videos(tmp_path, kind):
    path = tmp_path / "a.mp4"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a video at all " * 50)
    elif kind == "no index":
        cut_short(write_video(path, 48))
    elif kind == "audio only":
        _write_audio(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(Unusable, match=r"a\.mp4: "):
        probe(path)


@pytest.mark.parametrize("name", ["a\0b.mp4", "a\ud83d.mp4", "a" * 300])
def test_illegal_file_names(tmp_path, name):
    with pytest.raises(Unusable):
        probe(tmp_path / name)


@pytest.mark.parametrize("linked", [False, True])
def test_pipe_is_not_opened(tmp_path, linked):
    """Opening it would block for ever."""
    os.mkfifo(tmp_path / "pipe.mp4")
    path = tmp_path / "pipe.mp4"
    if linked:
        path = tmp_path / "link.mp4"
        path.symlink_to("pipe.mp4")
    with pytest.raises(Unusable, match=r"(pipe|link)\.mp4: is not a regular file"):
        probe(path)
    real = tmp_path / "real.mp4"
    real.symlink_to(write_video(tmp_path / "a.mp4", 3))
    assert probe(real).width == 64


def _write_audio(path):
    with av.open(str(path), "w") as file:
        write_silence(file, file.add_stream("aac", rate=44100), 0.2)


def test_single_frame_is_a_video_and_an_extreme_shape_is_not(tmp_path):
    assert numbers(read_all(write_video(tmp_path / "a.mp4", 1))) == [0]
    path = write_video(tmp_path / "b.mp4", 1, size=(2, 400))
    with pytest.raises(Unusable, match=r"b.mp4: the shape of 2x400 pixels is too far from 32x64"):
        read_all(path)
