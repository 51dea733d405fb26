"""Real files: every frame rate, size and kind of damage, and only the part that is asked for."""

import math
import os

import numpy as np
import pytest

from longlive_jax.data.clips import decoding
from longlive_jax.data.clips.dataset import Shot, Unusable
from longlive_jax.data.clips.decoding import check_fits, frames_of, probe, read_frames, verify
from tests.longlive_jax.data.clips.videos import cut_short, numbers, write_video

SIZE = (32, 64)


def all_of(path, size=SIZE, **shot):
    shot = Shot(path, "", **shot)
    return read_frames(shot, range(frames_of(shot)), size)


@pytest.mark.parametrize(
    ("fps", "frames", "shown"),
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
def test_every_frame_rate_becomes_24(tmp_path, fps, frames, shown):
    path = write_video(tmp_path / "a.mp4", frames, fps)
    assert numbers(all_of(path)) == shown
    info = probe(path)
    assert float(info.seconds) == pytest.approx(frames / fps, abs=2e-3)
    assert float(info.rate) == pytest.approx(fps) and (info.height, info.width) == SIZE


def test_variable_frame_rate_goes_by_the_timestamps(tmp_path):
    stamps = [0, 0.1, 0.3, 0.34, 0.5, 1.0]
    path = write_video(tmp_path / "a.mp4", 6, 24, stamps=stamps, ahead=0)
    found = numbers(all_of(path))
    moments = (np.arange(len(found)) + 0.25) / 24
    assert found == [max(k for k, at in enumerate(stamps) if at <= t) for t in moments]
    assert len(found) >= 25


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.avi", "a.mov"])
def test_containers_and_rounded_timestamps(tmp_path, name):
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4"}.get(name, "libx264")
    path = write_video(tmp_path / name, 29, codec=codec)
    assert numbers(all_of(path)) == list(range(29))
    verify(path, decode=True)


def test_sound_does_not_count_into_the_length(tmp_path):
    path = write_video(tmp_path / "a.mp4", 29, audio=True)
    assert numbers(all_of(path)) == list(range(29))
    verify(path)


def test_a_part_equals_the_same_part_of_the_whole(tmp_path):
    path = write_video(tmp_path / "a.mp4", 120, 30, gop=7)
    whole = all_of(path)
    assert len(whole) == 96
    for first in range(0, 96, 5):
        shot = Shot(path, "")
        frames = [i for i in range(first, min(first + 9, 96)) for _ in range(1 + (i == first + 2))]
        np.testing.assert_array_equal(read_frames(shot, frames, SIZE), whole[frames])


def test_only_the_needed_part_is_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 240, gop=12)
    seen, frames = [], decoding._frames

    def counted(container, stream):
        for frame in frames(container, stream):
            seen.append(frame.pts)
            yield frame

    monkeypatch.setattr(decoding, "_frames", counted)
    read_frames(Shot(path, ""), range(150, 160), SIZE)
    assert len(seen) <= 12 + 10 + 1


def test_a_file_whose_index_leads_past_the_frame_is_read_from_its_start(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 60, gop=6)
    decode = decoding._decode

    def late(path, moment):
        yield from (item for item in decode(path, moment) if moment is None or item[1] > moment + 1)

    monkeypatch.setattr(decoding, "_decode", late)
    assert numbers(read_frames(Shot(path, ""), range(40, 45), SIZE)) == list(range(40, 45))


def test_start_and_end_of_a_shot(tmp_path):
    path = write_video(tmp_path / "a.mp4", 60)
    assert numbers(all_of(path, start=0.5, end=1.0)) == list(range(12, 24))
    assert numbers(all_of(path, start=2.0)) == list(range(48, 60))
    assert numbers(all_of(path, start=2.0, end=99.0)) == list(range(48, 60))
    with pytest.raises(Unusable, match=r"starts at 3 s, the video lasts 2\.50 s"):
        frames_of(Shot(path, "", start=3.0))


@pytest.mark.parametrize("source", [(32, 64), (90, 160), (31, 63), (33, 121), (100, 40)])
@pytest.mark.parametrize("size", [(32, 64), (48, 32)])
def test_pictures_keep_their_shape_and_are_cropped_centrally(tmp_path, source, size):
    """A ring in the middle stays round, whatever the sizes are."""
    path = write_video(tmp_path / "a.mp4", 1, size=source)
    assert all_of(path, size).shape == (1, *size, 3)
    scale = max(size[0] / source[0], size[1] / source[1])
    # The border between two of the eight columns, where it must lie after scaling and cropping.
    column = math.ceil(source[1] / 8)
    frames = np.zeros((1, *source, 3), np.uint8)
    frames[:, :, 4 * column :] = 255
    wanted = (4 * column - source[1] / 2) * scale + size[1] / 2
    got = _rendered(tmp_path / "b.mp4", frames, size)[0, size[0] // 2, :, 0] < 128
    assert got.sum() == pytest.approx(wanted, abs=1.5)


def _rendered(path, frames, size):
    """`frames[0]` written and read back at `size`."""
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=24)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(frames[0], format="rgb24")))
        file.mux(stream.encode(None))
    return all_of(path, size)


def test_rotated_video_is_upright(tmp_path):
    plain = all_of(write_video(tmp_path / "a.mp4", 3))
    for degrees, turns in ((90, 1), (180, 2), (-90, 3)):
        path = write_video(tmp_path / f"{turns}.mp4", 3, rotation=degrees)
        size = SIZE[::-1] if turns % 2 else SIZE
        np.testing.assert_array_equal(all_of(path, size), np.rot90(plain, turns, axes=(1, 2)))


def test_pixels_that_are_not_square(tmp_path):
    """32x64 pixels twice as high as wide are a square picture."""
    path = write_video(tmp_path / "a.mp4", 1, stretch="1/2")
    assert probe(path).stretch == 0.5
    square = all_of(path, (32, 32))
    plain = all_of(write_video(tmp_path / "b.mp4", 1), (32, 64))
    assert np.abs(square[0, 16, :, 0] - plain[0, 16, ::2, 0].astype(int)).mean() < 30


def test_colours_survive(tmp_path):
    frames = np.zeros((1, 32, 64, 3), np.uint8)
    frames[:] = (200, 40, 90)
    got = _rendered(tmp_path / "a.mp4", frames, SIZE)
    assert np.abs(got.astype(int) - frames).max() <= 6


def test_a_cut_file_with_its_index_first(tmp_path):
    """The header still promises the whole length; what is there can be read."""
    options = {"movflags": "faststart"}
    path = cut_short(write_video(tmp_path / "a.mp4", 96, options=options, gop=12))
    assert frames_of(Shot(path, "")) == 96
    with pytest.raises(Unusable, match=r"a.mp4: cannot be read past .* says 4.00 s; it is cut"):
        all_of(path)
    assert numbers(read_frames(Shot(path, ""), range(10), SIZE)) == list(range(10))
    for decode in (False, True):
        with pytest.raises(Unusable, match="cut short"):
            verify(path, decode=decode)


@pytest.mark.parametrize("use", [probe, verify])
def test_a_header_that_promises_more_frames_than_the_file_has_bytes(tmp_path, use):
    """It would be planned for two years of video."""
    path = write_video(tmp_path / "a.avi", 40, codec="mpeg4")
    content = bytearray(path.read_bytes())
    for at in (content.index(b"strh") + 40, content.index(b"avih") + 24):
        content[at : at + 4] = (0x7FFFFFF0).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(Unusable, match=r"a\.avi: cannot be read past 1\.67 s"):
        use(path)


def test_a_still_picture_has_more_frames_than_bytes(tmp_path):
    path = write_video(tmp_path / "a.mp4", 2, stamps=[0, 3600], ahead=0)
    assert path.stat().st_size < 3600 * 24
    assert probe(path).seconds > 3599


def test_a_shape_is_checked_by_one_frame(tmp_path):
    path = write_video(tmp_path / "a.mp4", 30, size=(200, 20), rotation=90)
    check_fits(Shot(path, "", start=0.5), (20, 200))
    with pytest.raises(Unusable, match=r"a\.mp4: 200x20 pixels are too far from the shape of"):
        check_fits(Shot(path, ""), (200, 20))


def test_damage_in_the_middle_is_found_by_decoding(tmp_path):
    path = write_video(tmp_path / "a.mp4", 96, gop=12)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400)
    path.write_bytes(content)
    with pytest.raises(Unusable, match=r"a\.mp4: "):
        verify(path, decode=True)


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "no index", "only sound", "folder"])
def test_files_that_are_no_videos(tmp_path, kind):
    path = tmp_path / "a.mp4"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a video at all " * 50)
    elif kind == "no index":
        cut_short(write_video(path, 48))
    elif kind == "only sound":
        _write_sound(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(Unusable, match=r"a\.mp4: "):
        probe(path)


@pytest.mark.parametrize("name", ["a\0b.mp4", "a\ud83d.mp4", "a" * 300])
def test_names_that_no_file_can_have(tmp_path, name):
    with pytest.raises(Unusable):
        probe(tmp_path / name)


@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_regular_file_is_not_opened(tmp_path, linked):
    """A pipe would be waited on for ever."""
    os.mkfifo(tmp_path / "pipe.mp4")
    path = tmp_path / "pipe.mp4"
    if linked:
        path = tmp_path / "link.mp4"
        path.symlink_to("pipe.mp4")
    with pytest.raises(Unusable, match=r"(pipe|link)\.mp4: is no regular file"):
        probe(path)
    real = tmp_path / "real.mp4"
    real.symlink_to(write_video(tmp_path / "a.mp4", 3))
    assert probe(real).width == 64


def _write_sound(path):
    import av

    from tests.longlive_jax.data.clips.videos import _write_silence

    with av.open(str(path), "w") as file:
        _write_silence(file, file.add_stream("aac", rate=44100), 0.2)


def test_one_frame_is_a_video_and_a_thread_of_one_colour_is_not(tmp_path):
    assert numbers(all_of(write_video(tmp_path / "a.mp4", 1))) == [0]
    path = write_video(tmp_path / "b.mp4", 1, size=(2, 400))
    with pytest.raises(Unusable, match=r"b.mp4: 2x400 pixels are too far from the shape of 32x64"):
        all_of(path)
