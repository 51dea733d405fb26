"""`longlive sample` end to end, interrupted, and with mistakes found before compilation."""

import types

import numpy as np
import pytest

from longlive_jax.cli.app import run
from longlive_jax.cli.sample import file_lines
from longlive_jax.io.video import read_video
from longlive_jax.sampling.dispatch import SamplerDiverged
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.recorder import Recorder
from tests.tiny import write_tiny

SCRIPT = """
shots:
  - {prompt: a cat runs, chunks: 2}
  - {prompt: a dog sleeps, seconds: 0.5}
seed: 3
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "shots.yaml"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def command(checkpoint, script, tmp_path):
    config = f"--config.checkpoint={checkpoint}"
    return ["sample", config, f"--script={script}", f"--out={tmp_path / 'out'}"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "sample: --script is missing; write --script=VALUE"),
        (["shots.yaml", "--steps=4"], "sample: --script is missing; write --script=shots.yaml"),
        (["--seed=-1", "--script={script}"], "seed must be in [0, 2**32), got -1"),
    ],
)
def test_mistakes_in_the_script_and_seed(argv, message, script, capsys):
    assert run(["sample", *(word.format(script=script) for word in argv)]) == 2
    assert capsys.readouterr().err.endswith(f"longlive: {message}\n")


def test_files(command, tmp_path, capsys):
    assert run([*command, "--latents"]) == 0
    out = tmp_path / "out"
    names = {"video.mp4", "strip.png", "video.json", "video.latents.npy"}
    assert {p.name for p in out.iterdir()} == names
    assert read_video(out / "video.mp4").shape == (5 + 3 * 8, 6 * 64, 6 * 32, 3)
    assert np.load(out / "video.latents.npy").shape == (8, 4, 2, 4)
    output = capsys.readouterr()
    assert "29 frames" in output.out and "rounded up" in output.err
    assert all(str(out / name) in output.out for name in names)


def test_an_interrupt_leaves_the_finished_chunks(command, tmp_path, monkeypatch, capsys):
    appended = Recorder.append

    def interrupted(recorder, chunk):
        appended(recorder, chunk)
        if chunk.index == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "append", interrupted)
    assert run(command) == 130
    assert read_video(tmp_path / "out" / "video.mp4").shape[0] == 13
    assert "13 frames" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--config.sample.stepz=3"], "did you mean 'steps'"),
        (["--config.sampel.steps=3"], "did you mean 'sample'"),
        (["--config.checkpoint=/nowhere"], "is not a directory"),
        (["--script=/nowhere.yaml"], "no script"),
        (["--out=/proc/nowhere"], "cannot write"),
        (["--config.sample.size=(65,64)"], "not divisible"),
        (["--sede=3"], "did you mean '--seed'"),
        (["--seed=-1"], "seed must be in [0, 2**32), got -1"),
        (["--batch=0"], "--batch must be >= 1, got 0"),
        (["--stills=-1"], "--stills must be >= 0, got -1"),
        (["--video=/nowhere.mp4"], "does not exist"),
        (["--video_cuts=8"], "give --video, too"),
        (["--video=a.mp4", "--video_cuts=8,x"], "must be frames such as 48,96, got '8,x'"),
        (["--format=avi"], "unknown format 'avi'; known: gif, mp4, png, webm"),
        (["--scale=0"], "--scale must be in [1, 32], got 0"),
        (["--scale=33"], "--scale must be in [1, 32], got 33"),
    ],
)
def test_mistakes_cost_one_line(command, change, message, capsys, monkeypatch):
    def started(*_, **__):
        raise AssertionError("nothing may be sampled")

    monkeypatch.setattr(Pipeline, "stream", started)
    assert run([*command, *change]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_mistakes_in_the_script(command, script, capsys):
    for text, message in (
        ("shots: []", "no shots"),
        ("shots: [{prompt: a, chunks: 1}]\nimage: nothing.png", "nothing.png"),
        ("shots: [{prompt: a, chunks: 1}]\nsize: [100, 64]", "not divisible"),
    ):
        script.write_text(text)
        assert run(command) == 2
        assert message in capsys.readouterr().err


def test_an_existing_video_is_replaced_with_a_note(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "video.mp4").write_text("old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "append", interrupted)
    assert run(command) == 130
    assert f"replaces the existing {tmp_path / 'out' / 'video.mp4'}" in capsys.readouterr().err
    assert (tmp_path / "out" / "video.mp4").read_text() == "old"  # no chunk was finished


def test_a_sampler_that_diverges_is_one_line(command, monkeypatch, capsys):
    def diverged(*_):
        raise SamplerDiverged("the sampler has diverged: latents are not finite")

    monkeypatch.setattr(Recorder, "append", diverged)
    assert run(command) == 1
    assert "longlive: the sampler has diverged" in capsys.readouterr().err


def test_only_the_video_that_could_not_be_finished_is_said_to_be_unfinished(tmp_path):
    part, strip = tmp_path / "video.part.mp4", tmp_path / "strip.png"
    files = types.SimpleNamespace(
        paths=lambda: [part, strip], unfinished=lambda: [part],
        frames=13, seconds=0.5, size=(64, 32), scale=1,
    )  # fmt: skip
    assert file_lines(files) == [f"{part}: not finished, but can be played", str(strip)]
    files.unfinished = list
    assert file_lines(files) == [f"{part}: 13 frames, 0.5 s, 32x64 pixels", str(strip)]
