"""`longlive sample` from end to end, its interruption, and every mistake before compilation."""

import numpy as np
import pytest

from longlive_jax.cli import sample
from longlive_jax.cli.app import run
from longlive_jax.io.video import read_video
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


def test_files(command, tmp_path, capsys):
    assert run([*command, "--latents"]) == 0
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"video.mp4", "strip.png", "video.latents.npy"}
    assert read_video(out / "video.mp4").shape == (5 + 3 * 8, 64, 32, 3)
    assert np.load(out / "video.latents.npy").shape == (8, 4, 2, 4)
    said = capsys.readouterr()
    assert "29 frames" in said.out and "rounded up" in said.err


def test_interruption_keeps_what_is_finished(command, tmp_path, monkeypatch, capsys):
    shown = sample._shown

    def interrupted(stream):
        for chunk in shown(stream):
            yield chunk
            if stream.made == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(sample, "_shown", interrupted)
    assert run(command) == 130
    assert read_video(tmp_path / "out" / "video.mp4").shape[0] == 13
    assert "13 frames" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--config.sample.stepz=3"], "did you mean 'steps'"),
        (["--config.sampel.steps=3"], "did you mean 'sample'"),
        (["--config.checkpoint=/nowhere"], "no such checkpoint"),
        (["--script=/nowhere.yaml"], "no script"),
        (["--out=/proc/nowhere"], "cannot write"),
        (["--config.sample.size=(65,64)"], "not divisible"),
        (["--sede=3"], "did you mean '--seed'"),
        (["--batch=0"], "--batch"),
        (["--video=/nowhere.mp4"], "does not exist"),
    ],
)
def test_mistakes_cost_one_line(command, change, message, capsys, monkeypatch):
    def compiled(*_):
        raise AssertionError("nothing may be sampled")

    monkeypatch.setattr(sample, "_film", compiled)
    assert run([*command, *change]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_mistakes_in_the_script(command, script, capsys):
    for text, message in (
        ("shots: []", "no shots"),
        ("shots: [{prompt: a, chunks: 1}]\nimage: nothing.png", "nothing.png"),
        ("shots: [{prompt: a, chunks: 1}]\nsize: [100, 64]", "not divisible"),
    ):
        script.write_text(text)
        assert run(command) == 2
        assert message in capsys.readouterr().err
