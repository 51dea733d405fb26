"""The Python interface: prompts as scripts, options of one call, outputs, text features, errors."""

import contextlib
import dataclasses
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longlive_jax
from longlive_jax import Pipeline, SampleSpec, Shot, ShotScript, UserError
from longlive_jax.bench.timing import Compilations
from longlive_jax.captions import CUT_PREFIX
from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.sampling.dispatch import SamplerDiverged
from longlive_jax.sampling.engine import Engine
from longlive_jax.spec import Failure
from tests.tiny import TINY, tiny_parts

SCRIPT = ShotScript((Shot("a cat runs", chunks=2), Shot("a dog sleeps", chunks=2)), seed=3)


@pytest.fixture(scope="module")
def frames(tiny):
    return tiny.sample(SCRIPT)


def test_every_exported_name_exists():
    assert all(hasattr(longlive_jax, name) for name in longlive_jax.__all__)


def test_prompts_are_scripts(tiny, frames):
    """A list of prompts is one video with cuts, as `ShotScript.of`."""
    prompts = ["a cat runs", "a dog sleeps"]
    np.testing.assert_array_equal(tiny.sample(prompts, chunks=2, seed=3), frames)
    assert tiny.stream("a cat runs").timeline.num_chunks == 12  # 4 s in chunks of 8 / 24 s
    assert tiny.stream("a cat runs", seconds=1).timeline.num_chunks == 3


def test_a_batch_of_scripts_gets_consecutive_seeds(tiny):
    short = dataclasses.replace(SCRIPT, shots=SCRIPT.shots[:1])
    both = tiny.sample([short, short], seed=2**32 - 1)
    last, first = (tiny.sample(dataclasses.replace(short, seed=s)) for s in (2**32 - 1, 0))
    assert np.abs(both[0].astype(int) - last[0]).max() <= 2
    assert np.abs(both[1].astype(int) - first[0]).max() <= 2


def test_settings_of_one_call_compile_once():
    with Compilations() as compiled:
        pipe = Pipeline(Engine(*tiny_parts(), SampleSpec(**TINY)))
        first = pipe.sample("a cat runs", chunks=2, steps=1, seed=5)
        pipe.sample("a cat runs", chunks=2)
        again = pipe.sample("a dog sleeps", chunks=2, steps=1, guidance=1.0, solver="unipc", seed=7)
    assert compiled.counts["_step"] == 2 and pipe.spec.steps == 2
    own = pipe.with_settings(steps=1)
    np.testing.assert_array_equal(own.sample("a cat runs", chunks=2, seed=5), first)
    np.testing.assert_array_equal(own.sample("a dog sleeps", chunks=2, seed=7), again)


def test_outputs(tiny, frames):
    """Float frames round to the bytes; latents decode to them bit for bit."""
    pixels = tiny.sample(SCRIPT, output="float")
    assert pixels.dtype == np.float32 and np.abs(pixels).max() <= 1
    np.testing.assert_array_equal(np.rint((pixels + 1) * 127.5), frames)
    with Compilations() as compiled:
        latents = tiny.sample(SCRIPT, output="latents")
    assert latents.shape == (1, 8, 4, 2, 4) and latents.dtype == np.float32
    assert not compiled.counts["_decode_frames"]
    np.testing.assert_array_equal(latents, tiny.latents(SCRIPT))
    np.testing.assert_array_equal(tiny.decode(latents), frames)
    np.testing.assert_array_equal(tiny.decode(latents[0], output="float"), pixels)
    chunks = list(tiny.stream(SCRIPT, output="latents"))
    assert chunks[1].frames.shape == (1, 0, 64, 32, 3)
    assert [chunk.first_frame for chunk in chunks] == [0, 5, 13, 21]


def test_progress(tiny):
    seen = []
    tiny.sample(SCRIPT, callback=seen.append)
    assert [p.chunk for p in seen] == [0, 1, 2, 3] and {p.num_chunks for p in seen} == {4}
    assert [p.frames for p in seen] == [5, 13, 21, 29] and seen[3].seconds == 29 / 24
    assert [p.cuts for p in seen] == [(False,), (False,), (True,), (False,)]
    assert seen[2].prompts == (CUT_PREFIX + "a dog sleeps",) and seen[1].fraction == 0.5


def test_what_a_callback_raises_ends_the_call(tiny, frames):
    class Cancelled(Exception):
        pass

    def cancel(progress):
        raise Cancelled

    with pytest.raises(Cancelled):
        tiny.sample(SCRIPT, callback=cancel)
    np.testing.assert_array_equal(tiny.sample(SCRIPT), frames)


def test_text_features_in_place_of_prompts(tiny, frames):
    """Features under any name give what their text gives, bit for bit."""
    features = tiny.encode_prompts(["a cat runs", "a dog sleeps"])
    assert set(features) == {
        text + prompt for text in ("", CUT_PREFIX) for prompt in ("a cat runs", "a dog sleeps")
    }
    np.testing.assert_array_equal(tiny.sample(SCRIPT, features=features), frames)
    named = {
        "one": features["a cat runs"],
        "two": features["a dog sleeps"],
        CUT_PREFIX + "two": features[CUT_PREFIX + "a dog sleeps"],
    }
    script = ShotScript.of("one", "two", chunks=2, seed=3)
    np.testing.assert_array_equal(tiny.sample(script, features=named), frames)
    assert np.abs(tiny.sample(script).astype(int) - frames).max() > 2


def test_features_need_no_padding_and_no_text_for_a_cut(tiny):
    features = np.asarray(tiny.encode_prompts("a cat runs")["a cat runs"])
    used = int(np.flatnonzero(features.any(axis=1)).max()) + 1
    script = ShotScript.of("x", "x", chunks=1)
    full, short = (
        tiny.sample(script, features={"x": value}) for value in (features, features[:used])
    )
    np.testing.assert_array_equal(full, short)
    assert not tiny.stream("very long " * 60, features={"very long " * 60: features}).notes[1:]


def test_warnings_point_at_the_callers_line(tiny, monkeypatch):
    with contextlib.closing(tiny.stream("a cat runs", chunks=1)) as stream:
        monkeypatch.setattr(Engine, "unknown_words", lambda self, prompts: ("no such word",))
        for call in (tiny.sample, tiny.stream, stream.steer):
            with pytest.warns(UserWarning, match="no such word") as caught:
                call("an elephant", **({} if call == stream.steer else {"chunks": 1}))
            assert {warning.filename for warning in caught} == {__file__}


WRONG = [
    ("scripts must be a prompt", TypeError, lambda p: p.sample(5)),
    ("scripts must be a prompt", TypeError, lambda p: p.sample(None)),
    ("scripts is empty", UserError, lambda p: p.sample([])),
    ("must hold prompts (strings) or ShotScripts, got int", TypeError, lambda p: p.sample([5])),
    ("several videos are a list of ShotScript.of", TypeError, lambda p: p.sample([["a"], ["b"]])),
    ("'my/shots.yaml' is a path, not a prompt", UserError, lambda p: p.sample("my/shots.yaml")),
    ("scripts mixes prompts and ShotScripts", TypeError, lambda p: p.sample(["a", SCRIPT])),
    ("a shot needs a prompt", UserError, lambda p: p.sample(" ")),
    ("seconds: expected float, got '4'", UserError, lambda p: p.sample("a", seconds="4")),
    ("chunks: expected int, got True", UserError, lambda p: p.sample("a", chunks=True)),
    ("either seconds or chunks", UserError, lambda p: p.sample("a", seconds=1, chunks=1)),
    ("a ShotScript has its own durations", UserError, lambda p: p.sample(SCRIPT, seconds=1)),
    ("seed must be a whole number", TypeError, lambda p: p.sample(SCRIPT, seed=1.5)),
    ("seed must be a whole number", TypeError, lambda p: p.sample(SCRIPT, seed=True)),
    ("seed must be in", UserError, lambda p: p.sample(SCRIPT, seed=-1)),
    ("steps must be >= 1, got 0", UserError, lambda p: p.sample(SCRIPT, steps=0)),
    ("steps: expected int, got '4'", UserError, lambda p: p.sample(SCRIPT, steps="4")),
    ("steps must be <= 1000", UserError, lambda p: p.sample(SCRIPT, steps=10**9)),
    (
        "guidance: expected a finite number, got nan",
        UserError,
        lambda p: p.sample(SCRIPT, guidance=float("nan")),
    ),
    ("solver: 'ddim' is not one of", UserError, lambda p: p.sample(SCRIPT, solver="ddim")),
    ("output must be one of", UserError, lambda p: p.sample(SCRIPT, output="pil")),
    ("callback must be a function", TypeError, lambda p: p.sample(SCRIPT, callback=3)),
    ("'callback_on_step_end'", TypeError, lambda p: p.sample(SCRIPT, callback_on_step_end=print)),
    ("has no last frame", UserError, lambda p: p.sample(SCRIPT, endless=True)),
    ("endless must be True or False", TypeError, lambda p: p.stream(SCRIPT, endless="yes")),
    ("features must map", TypeError, lambda p: p.sample(SCRIPT, features=[1])),
    ("features must map", TypeError, lambda p: p.sample(SCRIPT, features={"a": 1})),
    ("have shape (3,)", UserError, lambda p: p.sample(SCRIPT, features={"a": np.ones(3)})),
    ("finite floats", UserError, lambda p: p.sample(SCRIPT, features={"a": np.ones((2, 12), int)})),
    ("prompts must be", TypeError, lambda p: p.encode_prompts([3])),
    ("latents must be an array", TypeError, lambda p: p.decode([1])),
    ("expected [b, f, h, w, 4]", UserError, lambda p: p.decode(np.ones((2, 4, 2, 3), np.float32))),
    ("not finite", UserError, lambda p: p.decode(np.full((2, 4, 2, 4), np.nan, np.float32))),
    ("output must be", UserError, lambda p: p.decode(np.ones((2, 4, 2, 4)), output="latents")),
    ("video must be an array", TypeError, lambda p: p.stream(SCRIPT, video="a.mp4")),
    ("has shape", UserError, lambda p: p.stream(SCRIPT, video=np.ones((9, 9, 9, 3), np.uint8))),
    (
        "has dtype int64",
        UserError,
        lambda p: p.stream(SCRIPT, video=np.ones((9, 64, 32, 3), np.int64)),
    ),
    (
        "must be in [-1, 1]",
        UserError,
        lambda p: p.stream(SCRIPT, video=np.full((9, 64, 32, 3), 255.0)),
    ),
    ("video_cuts and video_prompts", UserError, lambda p: p.stream(SCRIPT, video_cuts=(4,))),
    ("did you mean 'video'", TypeError, lambda p: p.stream(SCRIPT, vidoe=None)),
    ("prompt must be a string", TypeError, lambda p: p.stream(SCRIPT).steer(5)),
    ("prompt is empty", UserError, lambda p: p.stream(SCRIPT).steer("")),
    ("cut must be True or False", TypeError, lambda p: p.stream(SCRIPT).steer("a", cut=1)),
    ("video must be an index in [0, 0]", UserError, lambda p: p.stream(SCRIPT).steer("a", video=5)),
    ("unknown key 'stesp'; did you mean", UserError, lambda p: p.with_settings(stesp=1)),
    ("size must be (height, width)", UserError, lambda p: SampleSpec(size=64)),
    ("fps: expected float, got '24'", UserError, lambda p: SampleSpec(fps="24")),
    ("window must be >= 3", UserError, lambda p: SampleSpec(window=1)),
    ("engine must be an Engine", TypeError, lambda p: Pipeline("small_world")),
    ("device must be a jax.Device", TypeError, lambda p: Pipeline.from_checkpoint(device="gpu")),
    ("device must be in [0, ", UserError, lambda p: Pipeline.from_checkpoint(device=99)),
    ("checkpoint must be", UserError, lambda p: Pipeline.from_checkpoint(3)),
    ("seed: expected int, got None", UserError, lambda p: ShotScript.of("x", chunks=1, seed=None)),
    ("size must be (height, width)", UserError, lambda p: ShotScript.of("x", chunks=1, size=64)),
    ("nearest: 64x64", UserError, lambda p: ShotScript.of("x", chunks=1, size=(65, 65))),
    ("does not exist", UserError, lambda p: ShotScript.of("x", chunks=1, image="nope.png")),
    ("a shot needs a prompt", UserError, lambda p: ShotScript.of(["a", "b"], seconds=1)),
    ("shots: expected a list", UserError, lambda p: ShotScript("a")),
    ("either seconds or chunks", UserError, lambda p: ShotScript.of("x")),
    ("got more than 1e9", UserError, lambda p: ShotScript.of("x", chunks=10**5000)),
    ("path of a script", TypeError, lambda p: longlive_jax.read_scripts(5)),
    ("frames must be", UserError, lambda p: longlive_jax.write_video("x.mp4", np.ones((3, 3)))),
]


@pytest.mark.parametrize(("message", "kind", "call"), WRONG, ids=[row[0][:24] for row in WRONG])
def test_wrong_arguments_are_named_before_anything_compiles(tiny, message, kind, call):
    with Compilations() as compiled, pytest.raises(kind, match=re.escape(message)) as caught:
        call(tiny)
    assert "\n" not in str(caught.value) and not compiled.counts["_step"]


def test_unknown_words_are_noted_for_each_script(tiny_world):
    """Only words that are unknown as a whole; prompts with given features are not read."""
    pipe = Pipeline.from_checkpoint(tiny_world)
    first = ShotScript.of("a red dragon, flies left", chunks=1, name="first")
    second = ShotScript.of("a red circle moves left on a mint background", chunks=1)
    with pytest.warns(UserWarning, match="does not know the words 'dragon', 'flies'; all"):
        stream = pipe.stream([first, second])
    assert stream.notes == (
        "first: the text encoder does not know the words 'dragon', 'flies'; all unknown words look "
        "the same to it",
    )
    with pytest.warns(UserWarning, match="does not know the word 'slowly'; all"):
        pipe.stream(second).steer("a red circle moves slowly")
    features = pipe.encode_prompts("a red circle moves up")["a red circle moves up"]
    assert not pipe.stream("up with dragons", features={"up with dragons": features}).notes


def test_numbers_and_sizes_of_numpy_are_accepted(tiny):
    script = ShotScript.of(
        "x", seconds=np.float32(0.5), seed=np.uint32(9), size=[np.int64(64), np.int64(32)]
    )
    assert script.seed == 9 and type(script.seed) is int
    assert tiny.stream(script, steps=np.int64(1)).timeline.num_chunks == 2


def test_short_descriptions(tiny):
    assert repr(tiny) == (
        "Pipeline(64x32 at 24 fps, chunks of 2 latents, unipc with 2 steps, guidance 1, cpu:0)"
    )
    stream = tiny.stream(SCRIPT)
    assert repr(stream) == "Stream(1 video, 4 chunks, 0 dispatched)"
    next(stream)
    stream.close()
    assert repr(stream) == "Stream(closed)"


def test_two_threads_use_one_pipeline(tiny, frames):
    """Each gets what it gets alone, and one is steered from a third thread meanwhile."""
    other = ShotScript.of("a bird", "a cat runs", chunks=2, seed=8)
    pipe = tiny.with_settings(ahead=0)
    alone = [frames, pipe.sample(other), _steered(pipe)]
    results: dict[int, np.ndarray] = {}
    calls = [lambda: pipe.sample(SCRIPT), lambda: pipe.sample(other), lambda: _steered(pipe)]

    def run(i):
        results[i] = calls[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(alone):
        np.testing.assert_array_equal(results[i], expected)


def _steered(pipe):
    """Frames of a stream that another thread steers after its first chunk."""
    stream = pipe.stream(SCRIPT)
    chunks = [next(stream)]
    thread = threading.Thread(target=stream.steer, args=("a bird",), kwargs={"cut": True})
    thread.start()
    thread.join()
    return np.concatenate([c.frames for c in [*chunks, *stream]], axis=1)


def test_all_models_are_on_the_given_device(tiny_checkpoint, frames):
    pipe = Pipeline.from_checkpoint(tiny_checkpoint, device=5)
    stream = pipe.stream(SCRIPT)
    chunks = list(stream)
    arrays = jax.tree.leaves((pipe.engine.params, stream.state.cache, stream.state.decoder))
    assert {x.device.id for x in (*arrays, chunks[0].latents)} == {5}
    assert repr(pipe).endswith("cpu:5)")
    np.testing.assert_array_equal(np.concatenate([c.frames for c in chunks], axis=1), frames)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_mesh_shares_the_videos_of_a_batch(tiny_checkpoint, tiny, guidance):
    """Four scripts on two devices, with cuts at different times, as on one device."""
    mesh = make_mesh(MeshSpec(data=2), jax.devices()[2:4])
    pipe = Pipeline.from_checkpoint(tiny_checkpoint, mesh=mesh, guidance=guidance)
    scripts = [
        ShotScript((Shot("a cat runs", chunks=n), Shot("a dog sleeps", chunks=4 - n)), seed=n)
        for n in (1, 2, 3)
    ]
    scripts.append(ShotScript.of("a bird", chunks=4, seed=9, negative_prompt="a dog"))
    stream = pipe.stream(scripts)
    frames = np.concatenate([chunk.frames for chunk in stream], axis=1)
    k = stream.state.cache.k
    assert {x.id for x in k.devices()} == {2, 3} and not k.sharding.is_fully_replicated
    expected = tiny.sample(scripts, guidance=guidance)
    assert np.abs(frames.astype(int) - expected).max() <= 2
    assert repr(pipe).endswith("cpu:2 and 1 more)")
    with pytest.raises(UserError, match="batch of 3 does not split over 2 devices"):
        pipe.stream(scripts[:3])


def test_meshes_that_shard_anything_but_videos(tiny_checkpoint):
    mesh = make_mesh(MeshSpec(sp=2), jax.devices()[:2])
    with pytest.raises(UserError, match=r"the mesh has sp=2; .* not supported yet"):
        Pipeline.from_checkpoint(tiny_checkpoint, mesh=mesh)
    with pytest.raises(TypeError, match="mesh must be a"):
        Pipeline.from_checkpoint(tiny_checkpoint, mesh=2)


def test_divergence_is_a_failure_of_one_line(tiny):
    """In the latents, and in the VAE's decoder alone, where clipping would hide it."""
    params = dict(tiny.engine.params)
    params["head"] = jax.tree.map(lambda x: x * jnp.nan, params["head"])
    broken = Pipeline(tiny.engine.with_params(params))
    with pytest.raises(Failure, match="diverged in chunk 1: latents") as caught:
        broken.sample("a cat runs", chunks=1)
    assert isinstance(caught.value, FloatingPointError) and "\n" not in str(caught.value)
    dit, vae, umt5, tokenizer = tiny_parts()
    vae.post_quant_conv.kernel[...] *= jnp.nan
    pipe = Pipeline(Engine(dit, vae, umt5, tokenizer, SampleSpec(**TINY)))
    with pytest.raises(SamplerDiverged):
        pipe.sample("a cat runs", chunks=1)
    with pytest.raises(SamplerDiverged):
        pipe.decode(np.zeros((2, 4, 2, 4), np.float32))
