"""From scripts to frames with random weights: lengths, batches, conditioning, wrong input."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from longlive_jax.bench.timing import Compilations
from longlive_jax.sampling.engine import Engine
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.script import Shot, ShotScript
from longlive_jax.sampling.settings import SampleSpec
from longlive_jax.spec import UserError
from tests.tiny import TINY, tiny_parts

SCRIPT = ShotScript((Shot("a cat runs", chunks=2), Shot("a dog sleeps", chunks=2)), seed=3)


@pytest.fixture(scope="module")
def frames(tiny):
    return tiny.sample(SCRIPT)


def test_frames(frames):
    """Two latents per chunk: 5 frames, then 8 per chunk."""
    assert frames.shape == (1, 5 + 3 * 8, 64, 32, 3) and frames.dtype == np.uint8


def test_the_scan_gives_the_latents_of_the_stream(tiny):
    latents = [np.asarray(chunk.latents) for chunk in tiny.stream(SCRIPT)]
    np.testing.assert_array_equal(tiny.latents(SCRIPT), np.concatenate(latents, axis=1))


def test_a_batch_of_different_lengths(tiny, frames):
    short = ShotScript((Shot("a dog sleeps", chunks=1),), seed=8)
    both = tiny.sample([SCRIPT, short])
    assert both.shape[:2] == (2, 29)
    assert np.abs(both[0].astype(int) - frames[0]).max() <= 2
    alone = tiny.sample(short)
    assert np.abs(both[1, :5].astype(int) - alone[0]).max() <= 2


def test_an_image_is_the_first_frame(tiny, tmp_path):
    Image.fromarray(np.full((64, 32, 3), 200, np.uint8)).save(tmp_path / "a.png")
    script = dataclasses.replace(SCRIPT, image=str(tmp_path / "a.png"))
    chunk = next(tiny.stream(script))
    frame = tiny.engine.encode(np.full((1, 1, 64, 32, 3), 200 / 127.5 - 1, np.float32))
    np.testing.assert_allclose(chunk.latents[:, 0], frame[:, 0], atol=1e-5)


def test_a_video_is_continued(tiny, frames):
    """A video of 4 chunks is continued; frames that do not fill a chunk are dropped with a note."""
    script = ShotScript.of("a cat runs", seconds=0.1)
    stream = tiny.stream(script, video=frames)
    (chunk,) = list(stream)
    assert chunk.frames.shape == (1, 8, 64, 32, 3) and chunk.first_frame == 0
    assert not stream.notes[1:]
    longer = np.concatenate([frames[:, :3], frames], axis=1)
    stream = tiny.stream(script, video=longer)
    assert any("3 frames are left out" in note for note in stream.notes)
    np.testing.assert_array_equal(next(stream).frames, chunk.frames)
    with pytest.raises(UserError, match="must have >= 5 frames, got 4"):
        tiny.stream(SCRIPT, video=frames[:, :4])


def test_everything_compiles_once():
    """The decoder twice: the first chunk of a video has fewer frames than the others."""
    with Compilations() as compiled:
        pipe = Pipeline(Engine(*tiny_parts(), SampleSpec(**TINY)))
        pipe.sample(SCRIPT)
        pipe.sample(dataclasses.replace(SCRIPT, seed=11))
        pipe.with_settings(shot_rope_offset=4).sample(SCRIPT)
    names = ("_text", "_step", "_decode_frames")
    assert [compiled.counts[name] for name in names] == [1, 1, 2]


def test_the_vae_may_have_a_device_of_its_own(frames):
    pipe = Pipeline(Engine(*tiny_parts(), SampleSpec(**TINY, vae_device=3)))
    stream = pipe.stream(SCRIPT)
    chunks = list(stream)
    assert {chunk.latents.device.id for chunk in chunks} == {pipe.engine.device.id} == {0}
    assert {x.device.id for x in jax.tree.leaves(stream.state.decoder)} == {3}
    np.testing.assert_array_equal(np.concatenate([x.frames for x in chunks], axis=1), frames)


def test_equal_prompts_are_computed_once(tiny):
    assert tiny.engine.text_kv(("a cat runs",)) is tiny.engine.text_kv(("a cat runs",))
    changed = tiny.with_settings(steps=1).engine
    assert changed.text_kv(("a cat runs",)) is tiny.engine.text_kv(("a cat runs",))


def test_other_parameters_give_other_keys_and_values(tiny):
    before = tiny.engine.text_kv(("a cat runs",))
    params = dict(tiny.engine.params)
    params["text_embedding"] = {
        name: {key: 2 * x for key, x in layer.items()}
        for name, layer in params["text_embedding"].items()
    }
    after = tiny.engine.with_params(params).text_kv(("a cat runs",))
    assert np.abs(np.asarray(after.v) - before.v).max() > 1e-3
    assert tiny.engine.text_kv(("a cat runs",)) is before


def test_guidance_doubles_the_cache_and_needs_negative_prompts(tiny):
    engine = tiny.engine
    assert engine.cache(1, (64, 32)).k.shape[1] == 1 and engine.negative_prompts([SCRIPT]) == ()
    guided = engine.with_settings(guidance=3.0, negative_prompt="bad")
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


def test_from_checkpoint(tiny_checkpoint, frames):
    pipe = Pipeline.from_checkpoint(tiny_checkpoint)
    assert pipe.spec.chunk_frames == 2
    np.testing.assert_array_equal(pipe.sample(SCRIPT), frames)


def test_directories_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        Pipeline.from_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"longlive\.json is missing"):
        Pipeline.from_checkpoint(tmp_path)


def test_parts_of_different_models_are_refused():
    dit, vae, umt5, tokenizer = tiny_parts()
    dit.cfg = dataclasses.replace(dit.cfg, in_channels=8)
    with pytest.raises(UserError, match="do not fit: the DiT takes 8 latent channels"):
        Engine(dit, vae, umt5, tokenizer, SampleSpec(**TINY))


def test_settings_of_loading_cannot_change_later(tiny):
    with pytest.raises(UserError, match="load again"):
        tiny.with_settings(dtype="bfloat16")
