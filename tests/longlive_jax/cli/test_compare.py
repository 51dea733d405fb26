"""`longlive compare`: what it writes, one set of weights at a time, and mistakes found before."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from longlive_jax.adapters import save_adapter
from longlive_jax.cli.app import run
from longlive_jax.cli.compare_models import _split, find_models
from longlive_jax.io.comparison import SideBySide
from longlive_jax.io.models import load_model
from longlive_jax.io.video import read_video
from longlive_jax.models.params import params_of
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.recorder import Recorder
from tests.longlive_jax.adapters.conftest import random_adapter
from tests.tiny import write_tiny

SCRIPT = """
shots:
  - {prompt: a cat runs, chunks: 2}
  - {prompt: a dog sleeps, chunks: 1}
seed: 3
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """An adapter that was made for two steps."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    params = params_of(load_model(checkpoint, "dit"))
    save_adapter(folder, random_adapter(params, settings={"steps": 2}))
    return folder


@pytest.fixture
def compare(checkpoint, tmp_path):
    """Runs `longlive compare` with the script and returns its exit code."""
    (tmp_path / "shots.yaml").write_text(SCRIPT)

    def run_compare(*words):
        files = [f"--script={tmp_path / 'shots.yaml'}", f"--out={tmp_path / 'out'}"]
        return run(["compare", *files, f"--checkpoint={checkpoint}", *words])

    return run_compare


@pytest.fixture
def loads(monkeypatch):
    """The settings of every pipeline that is loaded."""
    calls, load = [], Pipeline.from_checkpoint

    def record(folder, **settings):
        calls.append(settings)
        return load(folder, **settings)

    monkeypatch.setattr(Pipeline, "from_checkpoint", record)
    return calls


def test_files_and_report(compare, checkpoint, tmp_path, loads, capsys):
    """Models that differ in settings share weights; those of another precision have their own."""
    models = (
        f"{checkpoint},name=base",
        "steps=1",
        "dtype=bfloat16,name=rounded",
        "steps=2,name=same",
    )
    assert compare(*models, "--seed=7", "--format=mp4,png") == 0
    assert len(loads) == 2
    # 1. Every video with a record, and all of them together.
    out = tmp_path / "out"
    names = ["001-base", "002-checkpoint_steps_1", "003-rounded", "004-same"]
    assert {p.name for p in out.iterdir()} == {
        "strip.png", "compare.mp4", "compare.frames", "report.json",
        *(f"{name}.{ending}" for name in names for ending in ("mp4", "frames", "json")),
    }  # fmt: skip
    videos = [read_video(out / f"{name}.mp4") for name in names]
    assert all(video.shape == (21, 6 * 64, 6 * 32, 3) for video in videos)
    np.testing.assert_array_equal(videos[0], videos[3])
    assert (videos[0] != videos[1]).any() and (videos[0] != videos[2]).any()
    labels = ["base", "checkpoint, steps=1", "rounded", "same"]
    size = SideBySide(labels, (64, 32)).size
    assert read_video(out / "compare.mp4").shape == (21, *size, 3)
    with Image.open(out / "strip.png") as strip:
        assert strip.width > 8 * 192 and strip.height > 4 * 192
    # 2. The report.
    report = json.loads((out / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == labels
    assert report["script"]["seed"] == 7
    base, fewer, rounded, same = report["models"]
    assert fewer["given"] == {"steps": "1"} and fewer["settings"]["steps"] == 1
    assert rounded["settings"]["dtype"] == "bfloat16" and rounded["psnr_to_first"] > 20
    assert same["psnr_to_first"] is None and 0 < fewer["psnr_to_first"] < 99
    assert "psnr_to_first" not in base and base["frames"] == 21 and not base["interrupted"]
    assert base["seconds"].keys() == {"loading", "sampling", "first_chunk", "later_chunk"}
    assert str(out / "compare.mp4") in capsys.readouterr().out
    # 3. The record of a video samples it again.
    again = tmp_path / "again"
    script = f"--script={out / '002-checkpoint_steps_1.json'}"
    assert run(["sample", script, f"--out={again}", "--format=png"]) == 0
    for path in sorted((out / "002-checkpoint_steps_1.frames").iterdir()):
        assert_equal_pictures(path, again / "video.frames" / path.name)


def assert_equal_pictures(path, other):
    with Image.open(path) as picture, Image.open(other) as expected:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))


def test_settings_of_all_models_and_of_one(checkpoint):
    common = {"steps": 1, "size": (64, 64), "quant": {"policy": "none"}}
    texts = ["window=3", f"{checkpoint},steps=2,size=64x32,name=a b"]
    first, second = find_models(texts, str(checkpoint), common)
    assert (first.name, first.spec.steps, first.spec.window) == ("checkpoint, window=3", 1, 3)
    assert (second.name, second.spec.steps, second.spec.window) == ("a b", 2, 4)
    assert (first.spec.size, second.spec.size) == ((64, 64), (64, 32))
    assert first.weights == second.weights


def test_adapters(compare, checkpoint, adapter, tmp_path):
    """They bring their settings, unless the command line has others; strength 0 changes nothing."""
    models = (f"adapter={adapter}:0,name=none", f"adapter={adapter},adapter={adapter}:-1,name=both")
    assert compare("steps=1,name=base", *models, f"steps=1,adapter={adapter},name=one") == 0
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())["models"]
    assert [m["settings"]["steps"] for m in report] == [1, 2, 2, 1]
    assert [[a["scale"] for a in m["adapters"]] for m in report] == [[], [0.0], [1.0, -1.0], [1.0]]
    none, both = (read_video(out / f"{name}.mp4") for name in ("002-none", "003-both"))
    assert np.abs(none.astype(int) - both).mean() < 1
    assert report[3]["psnr_to_first"] < 40


def test_an_interrupt_keeps_the_videos_so_far(compare, tmp_path, monkeypatch):
    appended = Recorder.append

    def interrupted(recorder, chunk):
        appended(recorder, chunk)
        if chunk.index == 1 and recorder.videos[0].path.name.startswith("002"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "append", interrupted)
    assert compare("steps=1", "steps=2", "steps=3") == 130
    out = tmp_path / "out"
    assert read_video(out / "001-checkpoint_steps_1.mp4").shape[0] == 21
    assert read_video(out / "002-checkpoint_steps_2.mp4").shape[0] == 13
    models = json.loads((out / "report.json").read_text())["models"]
    assert [m["interrupted"] for m in models] == [False, True]
    assert not (out / "compare.mp4").exists() and not list(out.glob("003*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "compare takes 2 to 16 models, got 0"),
        (["steps=2"], "compare takes 2 to 16 models, got 1; write them like small_world"),
        (["steps=2", "stesp=3"], "stesp=3: unknown setting 'stesp'; did you mean 'steps'?"),
        (["steps=2", "quant.polici=fp8"], "unknown setting 'quant.polici'; did you mean"),
        (["steps=2", "steps=0"], "steps=0: sample: steps must be >= 1, got 0"),
        (["steps=2", "steps=many"], "steps=many: sample.steps: expected int, got 'many'"),
        (["steps=2", "steps=2"], "two models are named 'checkpoint, steps=2'; add name=LABEL"),
        (["steps=2", "steps=3,steps=4"], "steps is given twice; remove one"),
        (["steps=2", "steps=3,fast"], "expected KEY=VALUE after the checkpoint, got 'fast'"),
        (["steps=2", "/nowhere"], "/nowhere: checkpoint '/nowhere' is not a directory"),
        (["steps=2", "quant=nvpf4"], "quant=nvpf4: "),
        (["steps=2", "adapter=/nowhere"], "adapter=/nowhere: /nowhere"),
        (["steps=2", "adapter=/nowhere:x"], "the scale must be a finite number, got 'x'"),
        (["steps=2", "quant=nvfp4"], "has 24 inputs, which do not split into blocks of 16"),
        (["steps=2", "quant.implementation=xla"], "but nothing is quantized"),
        (["steps=2", "small_world"], "models must have the same size, got 64x32 of"),
        (["steps=2", "fps=12"], "same fps, got 24 of 'checkpoint, steps=2' and 12 of"),
        (["steps=2", "chunk_frames=4"], "same chunk_frames, got 2 of"),
        (["steps=2", "size=(64,64)"], "add size=HEIGHTxWIDTH to one of them"),
        (["steps=2", "size=64x40"], "not divisible by 32"),
        (["steps=2", "steps=3", "--script=/nowhere.yaml"], "no script at /nowhere.yaml"),
        (["steps=2", "steps=3", "--stills=0"], "--stills must be in [1, 64], got 0"),
        (["steps=2", "steps=3", "--scale=99"], "--scale must be in [1, 32], got 99"),
        (["steps=2", "steps=3", "--format=avi"], "unknown format 'avi'"),
        (["steps=2", "steps=3", "--seed=-1"], "seed must be in [0, 2**32), got -1"),
        (["steps=2", "steps=3", "--out=/proc/nowhere"], "cannot write"),
        (["steps=2", "steps=3", "--sed=3"], "unknown option '--sed'; did you mean '--seed'?"),
    ],
)
def test_mistakes_print_one_line_and_load_nothing(compare, words, message, capsys, monkeypatch):
    def load(*_, **__):
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr(Pipeline, "from_checkpoint", load)
    assert compare(*words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error, error


def test_other_temporal_strides_are_refused(compare, checkpoint, tmp_path, capsys):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    manifest = json.loads((other / "longlive.json").read_text())
    manifest["components"]["vae"]["temporal_down"] = [False, False, True]
    (other / "longlive.json").write_text(json.dumps(manifest))
    assert compare("steps=1", f"{other}") == 2
    message = "models must have the same temporal stride, got 4 of 'checkpoint, steps=1' and 2"
    assert message in capsys.readouterr().err


def test_a_script_of_several_videos_is_refused(compare, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("a cat\na dog\n")
    script = f"--script={tmp_path / 'two.txt'}"
    assert run(["compare", "steps=1", "steps=2", script, "--chunks=2"]) == 2
    assert "two.txt has 2 videos; compare takes a script of one" in capsys.readouterr().err


def test_commas_within_brackets_and_quotes_belong_to_a_value():
    assert _split("a,size=(64,32),name='x, y',kv=nvfp4") == [
        "a", "size=(64,32)", "name='x, y'", "kv=nvfp4"
    ]  # fmt: skip
