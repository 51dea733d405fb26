"""From scripts to frames with random weights: lengths, steering, conditioning, wrong input."""

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.script import Shot, ShotScript
from longlive_jax.sampling.settings import SampleSpec, spec_for
from longlive_jax.spec import UserError

SCRIPT = ShotScript((Shot("a cat runs", chunks=2), Shot("a dog sleeps", chunks=2)), seed=3)


@pytest.fixture(scope="module")
def frames(tiny):
    return tiny.sample(SCRIPT)


def test_frames(tiny, frames):
    """Two latents a chunk: 5 frames, then 8 a chunk."""
    assert frames.shape == (1, 5 + 3 * 8, 64, 32, 3) and frames.dtype == np.uint8
    assert [chunk.shape[1] for chunk in tiny.stream(SCRIPT)] == [5, 8, 8, 8]


def test_scan_gives_the_latents_of_the_stream(tiny):
    stream = tiny.stream(SCRIPT)
    parts = [np.asarray(stream.latents) for _ in stream]
    np.testing.assert_array_equal(tiny.latents(SCRIPT), np.concatenate(parts, axis=1))


@pytest.mark.parametrize("ahead", [0, 2])
def test_how_far_it_runs_ahead_changes_nothing(tiny, frames, ahead):
    np.testing.assert_array_equal(tiny.with_settings(ahead=ahead).sample(SCRIPT), frames)


def test_steering_by_hand_equals_the_script(tiny, frames):
    first = dataclasses.replace(SCRIPT, shots=SCRIPT.shots[:1])
    stream = tiny.with_settings(ahead=0).stream(first, endless=True)
    got = []
    for chunk in itertools.islice(stream, 4):
        got.append(chunk)
        if stream.made == 2:
            stream.steer("a dog sleeps", cut=True)
    np.testing.assert_array_equal(np.concatenate(got, axis=1), frames)
    stream.close()


def test_a_stream_says_what_each_chunk_shows(tiny):
    """Prompts, cuts and shots of two videos, one of them steered."""
    stream = tiny.stream([SCRIPT, SCRIPT])
    one, two = stream._lanes
    two.steer("a bird", cut=True)  # before the first chunk: no cut
    assert [lane.next(first=True) for lane in (one, two)] == [
        ("a cat runs", False, 0),
        ("a bird", False, 0),
    ]
    two.steer(None, cut=True)
    assert two.next(first=False) == (CUT_PREFIX + "a bird", True, 1)
    assert two.next(first=False) == ("a bird", False, 1)
    assert one.next(first=False) == ("a cat runs", False, 0)
    assert one.next(first=False) == (CUT_PREFIX + "a dog sleeps", True, 1)
    one.steer(None, cut=False)
    assert one.next(first=False) == ("a dog sleeps", False, 1)


def test_a_batch_of_different_lengths(tiny, frames):
    short = ShotScript((Shot("a dog sleeps", chunks=1),), seed=8)
    both = tiny.sample([SCRIPT, short])
    assert both.shape[:2] == (2, 29)
    assert np.abs(both[0].astype(int) - frames[0]).max() <= 2
    alone = tiny.sample(short)
    assert np.abs(both[1, :5].astype(int) - alone[0]).max() <= 2


def test_an_image_is_the_first_frame(tiny, frames, tmp_path):
    Image.fromarray(np.full((64, 32, 3), 200, np.uint8)).save(tmp_path / "a.png")
    script = dataclasses.replace(SCRIPT, image=str(tmp_path / "a.png"))
    stream = tiny.stream(script)
    next(stream)
    first = tiny.codec.encode(np.full((1, 1, 64, 32, 3), 200 / 127.5 - 1, np.float32))
    np.testing.assert_allclose(stream.latents[:, 0], first[:, 0], atol=1e-5)


def test_a_video_is_continued(tiny, frames):
    """29 frames of 4 chunks are continued; what is no whole chunk is left out and said."""
    stream = tiny.stream(ShotScript.of("a cat runs", seconds=0.1), video=frames)
    (more,) = list(stream)
    assert more.shape == (1, 8, 64, 32, 3) and not stream.notes[1:]
    longer = np.concatenate([frames[:, :3], frames], axis=1)
    stream = tiny.stream(ShotScript.of("a cat runs", seconds=0.1), video=longer)
    assert any("3 frames are left out" in note for note in stream.notes)
    np.testing.assert_array_equal(np.concatenate(list(stream), axis=1), more)
    with pytest.raises(UserError, match="at least 5"):
        tiny.stream(SCRIPT, video=frames[:, :4])


def test_compiled_once(tiny, frames):
    assert tiny.sampler.text._cache_size() == 1
    steps = tiny.sampler.step._cache_size()
    tiny.sample(dataclasses.replace(SCRIPT, seed=11))
    assert tiny.sampler.step._cache_size() == steps


def test_equal_prompts_are_computed_once(tiny):
    assert tiny.words(("a cat runs",)) is tiny.words(("a cat runs",))
    assert tiny._prompt("a cat runs") is tiny._prompt("a cat runs")


def test_guidance_needs_negative_rows(tiny):
    assert tiny.cache(1, (64, 32)).k.shape[1] == 1 and tiny.negative_prompts([SCRIPT]) == ()
    guided = tiny.with_settings(guidance=3.0, negative_prompt="bad")
    assert guided.cache(1, (64, 32)).k.shape[1] == 2
    assert guided.negative_prompts([SCRIPT]) == ("bad",)
    own = dataclasses.replace(SCRIPT, negative_prompt="worse")
    assert guided.negative_prompts([own]) == ("worse",)


def test_a_long_prompt_is_reported(tiny):
    with pytest.warns(UserWarning, match="tokens"):
        stream = tiny.stream(ShotScript.of("a very long prompt " * 20, seconds=0.1))
    assert any("tokens" in note for note in stream.notes)


def test_sizes(tiny):
    with pytest.raises(UserError, match="differ in size"):
        tiny.stream([SCRIPT, dataclasses.replace(SCRIPT, size=(32, 32))])
    with pytest.raises(UserError, match="divisible"):
        SampleSpec(size=(100, 64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"steps": 0}, "steps"),
        ({"window": 2}, "use at least 3"),
        ({"dtype": "float8"}, "not one of"),
        ({"vae_device": 99}, "devices 0 to"),
    ],
)
def test_wrong_settings(tiny_checkpoint, settings, message):
    with pytest.raises(UserError, match=message):
        spec_for(tiny_checkpoint, settings)


def test_from_checkpoint(tiny_checkpoint, frames):
    pipe = Pipeline.from_checkpoint(tiny_checkpoint)
    assert pipe.spec.chunk_frames == 2
    np.testing.assert_array_equal(pipe.sample(SCRIPT), frames)


def test_foreign_directories(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        Pipeline.from_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"longlive\.json is missing"):
        Pipeline.from_checkpoint(tmp_path)


def test_what_cannot_change_after_loading(tiny):
    with pytest.raises(UserError, match="load again"):
        tiny.with_settings(dtype="bfloat16")
