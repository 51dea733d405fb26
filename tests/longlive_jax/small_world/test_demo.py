"""The demo with random weights: files, report, and mistakes."""

import json

import numpy as np
import pytest

from longlive_jax.cli.app import run
from longlive_jax.io.video import read_video
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.small_world.demo import Clock, enlarged, film
from longlive_jax.small_world.demo_script import story_of

CAPTION = "a red circle moves left on a white background"


def test_demo_command(tiny_world, tmp_path, capsys):
    out = tmp_path / "demo"
    words = [f"--prompt={CAPTION}", "--prompt=a dog", "--scale=2", "--steps=1", "--seed=3"]
    assert run(["demo", f"--out={out}", f"--checkpoint={tiny_world}", *words]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["frames"] == 253 and report["judge"] is None
    assert "'a dog' has 2 words" in report["not_judged"][0]
    assert [shot["first_frame"] for shot in report["shots"]] == [0, 125]
    assert read_video(out / "video.mp4").shape == (253, 128, 128, 3)
    assert (out / "strip.png").stat().st_size
    said = capsys.readouterr().out
    assert "The judge knows only captions" in said and str(out / "video.mp4") in said


def test_report_of_a_judged_story(tiny_world, tmp_path):
    pipe = Pipeline.from_checkpoint(tiny_world, steps=1)
    script = story_of([CAPTION, CAPTION.replace("red", "blue")], 0, chunks=4)
    heard = []
    files, report = film(pipe, script, tmp_path, clock=Clock(), scale=1, on_chunk=heard.append)
    assert heard == [13, 16, 16, 16]
    assert report == json.loads(files.report.read_text())
    assert len(report["judge"]["shots"]) == 2 and report["judge"]["words"]
    assert {"first chunk, with compilation", "later chunks", "writing"} <= set(report["stages"])


def test_enlarged_pixels_are_squares():
    frames = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    big = enlarged(frames, 3)
    assert big.shape == (1, 6, 6, 3) and (big[0, 3:, :3] == frames[0, 1, 0]).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint=/nowhere"], "no such checkpoint"),
        (["--scale=0"], "--scale is 0"),
        (["--seed=-1"], "--seed is -1"),
        (["--out=/proc/demo"], "cannot write"),
        (["--sed=1"], "did you mean '--seed'"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys, tmp_path):
    out = [] if any("--out" in word for word in words) else [f"--out={tmp_path}"]
    assert run(["demo", *out, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
