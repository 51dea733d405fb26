"""Files of a recording: complete, broken off, and of a steered stream."""

import dataclasses

import numpy as np
import pytest

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.io.video import read_video
from longlive_jax.sampling import recorder
from longlive_jax.sampling.recorder import Recorder, file_name, prompt_segments
from longlive_jax.sampling.script import Shot, ShotScript
from longlive_jax.sampling.stream import Chunk
from longlive_jax.sampling.timeline import make_timeline

SCRIPTS = [
    ShotScript((Shot("a", chunks=1), Shot("b", chunks=1, cut=False), Shot("c", chunks=2))),
    ShotScript((Shot("a", chunks=2),)),
]


def chunk_of(timeline, i):
    """Chunk `i` of a stream that follows the timeline; frame n of the stream has colour 8 n."""
    first, end = timeline.num_frames(i), timeline.num_frames(i + 1)
    batch = len(timeline.prompts)
    colours = 8 * np.arange(first, end, dtype=np.uint8)[None, :, None, None, None]
    return Chunk(
        frames=np.broadcast_to(colours, (batch, end - first, 32, 32, 3)),
        latents=np.zeros((batch, 2, 2, 2, 4)),
        index=i,
        prompt=tuple(prompts[i] for prompts in timeline.prompts),
        cut=timeline.cuts[:, i],
        first_frame=first,
    )


@pytest.fixture
def strips(monkeypatch):
    """(colours of the stills by row, captions) of every strip that is written."""
    calls = []

    def strip(path, rows, captions):
        path.write_text("")
        calls.append(([[int(x[0, 0, 0]) // 8 for x in row] for row in rows], captions))
        return ()

    monkeypatch.setattr(recorder, "strip", strip)
    return calls


def test_segments_end_where_the_prompt_changes_or_the_camera_cuts():
    timeline = make_timeline(SCRIPTS, chunk_frames=2)
    assert prompt_segments(timeline, 0) == [(0, 1, "a"), (1, 2, "b"), (2, 4, "c")]
    assert prompt_segments(timeline, 1) == [(0, 2, "a")]


def test_each_video_has_its_own_length(tmp_path):
    timeline = make_timeline(SCRIPTS, chunk_frames=2)
    with Recorder(tmp_path, timeline, ["one", "two"], latents=True) as recording:
        for i in range(timeline.num_chunks):
            recording.append(chunk_of(timeline, i))
    assert len(read_video(tmp_path / "one.mp4")) == 29
    assert len(read_video(tmp_path / "two.mp4")) == 13
    assert np.load(tmp_path / "two.latents.npy").shape[0] == 4
    assert (tmp_path / "one.strip.png").exists()


def test_stills_are_spread_evenly_over_each_segment(tmp_path, strips):
    timeline = make_timeline(SCRIPTS[0], chunk_frames=2)
    with Recorder(tmp_path, timeline, ["video"], stills=3) as recording:
        for i in range(timeline.num_chunks):
            recording.append(chunk_of(timeline, i))
    assert strips == [([[0, 2, 4], [5, 8, 12], [13, 20, 28]], ["a", "b", "c"])]


def test_the_strip_of_a_steered_stream_shows_what_was_generated(tmp_path, strips):
    """From chunk 1 on the stream leaves the script, and cuts to another prompt at chunk 3."""
    timeline = make_timeline(SCRIPTS[0], chunk_frames=2)
    chunks = [chunk_of(timeline, i) for i in range(4)]
    no_cut, cut = np.array([False]), np.array([True])
    chunks[1:] = [
        dataclasses.replace(chunks[1], prompt=("x",), cut=no_cut),
        dataclasses.replace(chunks[2], prompt=("x",), cut=no_cut),
        dataclasses.replace(chunks[3], prompt=(CUT_PREFIX + "y",), cut=cut),
    ]
    with Recorder(tmp_path, timeline, ["video"], stills=3) as recording:
        for chunk in chunks:
            recording.append(chunk)
    # x was to last to the end of the video, so its last still is missing.
    assert strips == [([[0, 2, 4], [5, 16], [21, 24, 28]], ["a", "x", "y"])]


def test_every_frame_of_a_continued_video_is_written(tmp_path):
    """Its first chunk has as many frames as the others."""
    timeline = make_timeline(SCRIPTS[1], chunk_frames=2)
    chunks = [chunk_of(timeline, 1), chunk_of(timeline, 1)]
    chunks[0] = dataclasses.replace(chunks[0], index=0, first_frame=0)
    chunks[1] = dataclasses.replace(chunks[1], index=1, first_frame=8)
    with Recorder(tmp_path, timeline, ["video"]) as recording:
        for chunk in chunks:
            recording.append(chunk)
    assert len(read_video(tmp_path / "video.mp4")) == 16


def test_an_interrupted_recording_is_readable(tmp_path):
    timeline = make_timeline(SCRIPTS[0], chunk_frames=2)
    with pytest.raises(KeyboardInterrupt), Recorder(tmp_path, timeline, ["video"]) as recording:
        recording.append(chunk_of(timeline, 0))
        raise KeyboardInterrupt
    assert len(read_video(tmp_path / "video.mp4")) == 5 and (tmp_path / "strip.png").exists()


def test_file_names_are_harmless():
    assert file_name("../a b/c", 3, True) == "003-a_b_c"
    assert file_name("", 3, True) == "003" and file_name("x", 0, False) == "video"
