"""Streams: what their chunks say, steering, state as data, and how far they run ahead."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.sampling.script import Shot, ShotScript
from longlive_jax.sampling.stream import PendingChunk, advance, run_ahead
from longlive_jax.sampling.timeline import make_timeline

SCRIPT = ShotScript((Shot("a cat runs", chunks=2), Shot("a dog sleeps", chunks=2)), seed=3)
PROMPTS = ["a cat runs", "a cat runs", CUT_PREFIX + "a dog sleeps", "a dog sleeps"]


@pytest.fixture(scope="module")
def frames(tiny):
    return tiny.sample(SCRIPT)


def joined(chunks):
    return np.concatenate([chunk.frames for chunk in chunks], axis=1)


def test_chunks_describe_themselves(tiny, frames):
    other = ShotScript((Shot("a bird", chunks=1),))
    chunks = list(tiny.stream([SCRIPT, other]))
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]
    assert [chunk.frames.shape[1] for chunk in chunks] == [5, 8, 8, 8]
    assert [chunk.first_frame for chunk in chunks] == [0, 5, 13, 21]
    assert [chunk.prompt for chunk in chunks] == [(prompt, "a bird") for prompt in PROMPTS]
    np.testing.assert_array_equal([chunk.cut[0] for chunk in chunks], [0, 0, 1, 0])
    assert not any(chunk.cut[1] for chunk in chunks)
    assert all(chunk.latents.shape == (2, 2, 4, 2, 4) for chunk in chunks)


@pytest.mark.parametrize("ahead", [0, 2])
def test_running_ahead_changes_no_frame(tiny, frames, ahead):
    stream = tiny.with_settings(ahead=ahead).stream(SCRIPT)
    next(stream)
    assert stream.state.num_chunks == 1 + ahead
    np.testing.assert_array_equal(joined(stream), frames[:, 5:])


def test_a_steered_stream_equals_the_script(tiny, frames):
    """With nothing in flight, steering takes effect in the next chunk."""
    first = dataclasses.replace(SCRIPT, shots=SCRIPT.shots[:1])
    stream = tiny.with_settings(ahead=0).stream(first, endless=True)
    chunks = []
    for chunk in itertools.islice(stream, 4):
        chunks.append(chunk)
        assert stream.state.num_chunks == len(chunks)
        if chunk.index == 1:
            stream.steer("a dog sleeps", cut=True)
    np.testing.assert_array_equal(joined(chunks), frames)
    assert [chunk.prompt[0] for chunk in chunks] == PROMPTS
    assert [bool(chunk.cut[0]) for chunk in chunks] == [False, False, True, False]
    stream.close()


def test_one_video_of_a_batch_is_steered(tiny):
    stream = tiny.with_settings(ahead=0).stream([SCRIPT, SCRIPT])
    stream.steer("a bird", cut=True, video=1)  # before the first chunk: not a cut
    chunk = next(stream)
    assert chunk.prompt == ("a cat runs", "a bird") and not chunk.cut.any()
    with pytest.raises(ValueError, match="the prompt is empty"):
        stream.steer(" ")
    stream.close()


def test_timelines_of_two_videos_one_of_them_steered():
    """Prompt, cut and shot of every chunk."""
    script, steered = make_timeline([SCRIPT, SCRIPT], chunk_frames=2).videos()
    steered = steered.steer("a bird", cut=True)  # before the first chunk: not a cut
    chunk, script = script.advance(is_first=True)
    assert chunk == ("a cat runs", False, 0)
    chunk, steered = steered.advance(is_first=True)
    assert chunk == ("a bird", False, 0)
    steered = steered.steer(None, cut=True)
    chunk, steered = steered.advance(is_first=False)
    assert chunk == (CUT_PREFIX + "a bird", True, 1)
    chunk, steered = steered.advance(is_first=False)
    assert chunk == ("a bird", False, 1)
    chunk, script = script.advance(is_first=False)
    assert chunk == ("a cat runs", False, 0)
    chunk, script = script.advance(is_first=False)
    assert chunk == (CUT_PREFIX + "a dog sleeps", True, 1)
    chunk, script = script.steer(None, cut=False).advance(is_first=False)
    assert chunk == ("a dog sleeps", False, 1)


def test_a_snapshot_of_the_state_resumes_the_video(tiny, frames):
    """The state is a pytree: copied after two chunks, it gives the third chunk again."""
    engine = tiny.engine.with_settings(ahead=0)
    stream = type(tiny)(engine).stream(SCRIPT)
    next(stream), next(stream)
    snapshot = jax.tree.map(jnp.copy, stream.state)
    np.testing.assert_array_equal(next(stream).frames, frames[:, 13:21])
    prompts, videos = zip(*(v.advance(is_first=False) for v in snapshot.videos), strict=True)
    text_kv = engine.text_kv([video.prompt for video in prompts])
    conditioning = engine.conditioning([SCRIPT], engine.size_of([SCRIPT]))
    chunk, state = advance(engine, conditioning, snapshot, prompts, text_kv)
    np.testing.assert_array_equal(chunk.fetch().frames, frames[:, 13:21])
    assert (state.num_chunks, state.num_frames, chunk.first_frame) == (3, 21, 13)
    assert videos == stream.state.videos
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        _ = stream.state


def pending(value, index=0):
    x = jnp.full((1, 2), value)
    return PendingChunk(x.astype(jnp.uint8), jnp.isfinite(x).all(), x, index, (), np.zeros(1), 0)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_chunks_come_in_order(ahead):
    dispatched = []

    def chunks():
        for i in range(5):
            dispatched.append(i)
            yield pending(float(i), i)

    for i, chunk in enumerate(run_ahead(chunks(), ahead=ahead)):
        assert chunk.index == i and (chunk.frames == i).all()
        assert len(dispatched) == min(5, i + 1 + ahead)
    assert i == 4


def test_leaving_early_waits_for_chunks_in_flight(monkeypatch):
    """A process that exits while frames are copied to the host would abort."""
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waited.append(float(x[1][0, 0])))
    stream = run_ahead((pending(float(i)) for i in range(9)), ahead=2)
    next(stream)
    stream.close()
    assert sorted(waited) == [0, 1, 2]


def test_latents_that_are_not_finite_are_an_error():
    with pytest.raises(FloatingPointError, match="diverged"):
        next(run_ahead(iter([pending(jnp.nan)]), ahead=0))
