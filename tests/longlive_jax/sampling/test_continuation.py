"""Videos that are continued: frames counted, shots of the past, cuts on the first shot."""

import re

import jax
import numpy as np
import pytest

from longlive_jax.bench.timing import Compilations
from longlive_jax.captions import CUT_PREFIX
from longlive_jax.sampling.continuation import make_past_video
from longlive_jax.sampling.script import Shot, ShotScript
from longlive_jax.sampling.timeline import make_timeline
from longlive_jax.spec import UserError

SCRIPT = ShotScript.of("a cat runs", "a dog sleeps", chunks=2, seed=3)
SIZE = (64, 32)


def video(frames, batch=1):
    pixels = np.random.default_rng(0).integers(0, 256, (batch, frames, *SIZE, 3), np.uint8)
    return pixels[:, :, :1, :1] + np.zeros_like(pixels)


@pytest.fixture(scope="module")
def latents(tiny):
    """Four chunks: two shots of two."""
    return tiny.sample(SCRIPT, output="latents")


def test_frames_and_cuts_of_a_continuation(tiny):
    """100 frames of the past; every generated chunk has 8, and frames count from the first."""
    script = ShotScript((Shot("a cat", chunks=3), Shot("a dog", chunks=2)))
    stream = tiny.stream(script, video=video(100))
    chunks = list(stream)
    assert [chunk.first_frame for chunk in chunks] == [0, 8, 16, 24, 32]
    assert sum(chunk.frames.shape[1] for chunk in chunks) == 40 == stream.timeline.num_frames(5)
    assert stream.timeline.cut_frames(0) == [24] and chunks[3].cut
    assert any("first 7 frames are left out" in note for note in stream.notes)
    silent = list(tiny.stream(script, video=video(100), output="latents"))
    assert [chunk.first_frame for chunk in silent] == [0, 8, 16, 24, 32]
    np.testing.assert_array_equal(silent[4].latents, chunks[4].latents)


@pytest.mark.parametrize(("cut", "begins"), [(None, False), (False, False), (True, True)])
def test_a_cut_on_the_first_shot_counts_if_a_video_is_continued(cut, begins):
    script = ShotScript((Shot("a", chunks=2, cut=cut), Shot("b", chunks=1)))
    new = make_timeline(script, chunk_frames=2)
    assert new.cuts.tolist() == [[False, False, True]] and new.cut_frames(0) == [13]
    after = make_timeline(script, chunk_frames=2, past_shots=3)
    assert after.cuts.tolist() == [[begins, False, True]]
    assert after.shots.tolist() == [[2 + begins, 2 + begins, 3 + begins]]
    assert after.prompts == ((CUT_PREFIX * begins + "a", "a", CUT_PREFIX + "b"),)
    assert after.cut_frames(0) == [0] * begins + [16]
    (position,) = after.videos()
    assert position.advance(is_first=False)[0] == (after.prompts[0][0], begins, 2 + begins)


def test_a_past_of_two_shots_enters_the_cache_as_sampling_wrote_it(tiny, latents):
    """Bookkeeping exactly; keys and values up to rounding, and so the chunks that follow."""
    pipe = tiny.with_settings(ahead=0)
    both_shots = ShotScript.of("a cat runs", "a dog sleeps", chunks=2, seed=3)
    sampled = pipe.stream(both_shots)
    assert len(list(sampled)) == 4
    cut = sampled.timeline.cut_frames(0)
    expected = pipe.sample(
        ShotScript.of("a cat runs", "a dog sleeps", "a dog sleeps", chunks=2, seed=3)
    )
    script = ShotScript((Shot("a dog sleeps", chunks=2, cut=True),), seed=3)
    stream = pipe.stream(
        script,
        video_latents=latents,
        video_cuts=cut,
        video_prompts=["a cat runs", "a dog sleeps"],
    )
    stream._write_past(stream._past)
    for name in ("slot_chunk", "start", "sink_start", "sink_length", "num_chunks"):
        a, b = (getattr(s.state.cache, name) for s in (sampled, stream))
        np.testing.assert_array_equal(a, b, err_msg=name)
    for a, b in zip(jax.tree.leaves(sampled.state), jax.tree.leaves(stream.state), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    frames = pipe.sample(
        script,
        video_latents=latents,
        video_cuts=cut,
        video_prompts=["a cat runs", "a dog sleeps"],
    )
    assert np.abs(frames.astype(int) - expected[:, 29:]).max() <= 2


def test_shots_of_a_given_video_end_with_whole_chunks(tiny):
    """Shot 1: 5 + 8 of 15 frames; shot 2: 16 of 20; shot 3: 8 of 9."""
    past = make_past_video(tiny.engine, 1, SIZE, video=video(44), cuts=(15, np.int64(35)))
    assert [piece.shape[1] for piece in past.pieces] == [5, 8, 8, 8, 8]
    assert past.cuts == (False, False, True, False, True) and past.num_shots == 3
    frames = np.arange(44)[None, :, None, None, None] + np.zeros((1, 44, *SIZE, 3))
    numbered = make_past_video(tiny.engine, 1, SIZE, video=frames.astype(np.uint8), cuts=(15, 35))
    assert [int(piece[0, 0, 0, 0, 0]) for piece in numbered.pieces] == [2, 7, 19, 27, 36]
    assert [int(piece[0, -1, 0, 0, 0]) for piece in numbered.pieces] == [6, 14, 26, 34, 43]
    assert [note.split(":")[0] for note in past.notes] == [
        "the first 2 frames of shot 1 are left out",
        "the first 4 frames of shot 2 are left out",
        "the first frame of shot 3 is left out",
    ]
    prompts = list(past.chunk_prompts(["x"], CUT_PREFIX))
    assert prompts == [
        [(CUT_PREFIX * cut + "x", cut, shot)]
        for cut, shot in zip(past.cuts, [0, 0, 1, 1, 2], strict=True)
    ]


def test_encoding_compiles_for_no_length_of_its_own(tiny):
    """First frame, chunk and rest; in pieces it gives the latents of one call, bit for bit."""
    with Compilations() as compiled:
        for frames in (13, 29, 37):
            clip = video(frames)[:, :, :32]
            past = make_past_video(tiny.engine, 1, (32, 32), video=clip)
            pieces = np.concatenate(list(past.latents(tiny.engine)), axis=1)
    assert compiled.counts["_encode_frames"] == 3
    pixels = clip.astype(np.float32) / 127.5 - 1
    np.testing.assert_array_equal(pieces, tiny.engine.encode(pixels, chunk_frames=2))


WRONG = [
    ("must have >= 5 frames, got 4", {"video": video(4)}),
    ("shot 2 of the video to continue must have >= 8", {"video": video(44), "video_cuts": (40,)}),
    ("ascending and in [1, 43], got 44", {"video": video(44), "video_cuts": (44,)}),
    ("ascending and in [1, 43], got 9, 9", {"video": video(44), "video_cuts": (9, 9)}),
    ("must be a list of frame indices", {"video": video(44), "video_cuts": (1.5,)}),
    ("must be a list of frame indices", {"video": video(44), "video_cuts": 7}),
    ("has 2 prompts for 1 shots", {"video": video(44), "video_prompts": ["a", "b"]}),
    ("must be a list of strings", {"video": video(44), "video_prompts": "a"}),
    ("either video or video_latents", {"video": video(5), "video_latents": np.ones(1)}),
    ("has shape (1, 2, 3, 3, 4); expected [1,", {"video_latents": np.ones((2, 3, 3, 4))}),
    ("must be a multiple of 2", {"video_latents": np.ones((3, 4, 2, 4))}),
    ("must be finite floats", {"video_latents": np.full((2, 4, 2, 4), np.nan)}),
    ("lies within a chunk", {"video_latents": np.ones((4, 4, 2, 4)), "video_cuts": (6,)}),
]


@pytest.mark.parametrize(("message", "options"), WRONG, ids=[row[0][:30] for row in WRONG])
def test_wrong_videos(tiny, message, options):
    with pytest.raises(UserError, match=re.escape(message)):
        tiny.stream(SCRIPT, **options)
