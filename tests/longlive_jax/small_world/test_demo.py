"""The demo with random weights: files, report and command-line errors."""

import json

import numpy as np
import pytest
from PIL import Image

from longlive_jax.cli.app import run
from longlive_jax.cli.demo import print_report
from longlive_jax.io.pictures import default_scale, enlarge
from longlive_jax.io.video import read_video
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.small_world import demo
from longlive_jax.small_world.demo import DemoHooks, StageTimer, make_demo
from longlive_jax.small_world.demo_script import script_from_prompts

CAPTION = "a red circle moves left on a white background"


def test_demo_command(tiny_world, tmp_path, capsys):
    out = tmp_path / "demo"
    flags = [f"--prompt={CAPTION}", "--prompt=a dog", "--scale=2", "--steps=1", "--seed=3", "--gif"]
    assert run(["demo", f"--out={out}", f"--checkpoint={tiny_world}", *flags]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["frames"] == 253 and report["judge"] is None
    assert "'a dog' has 2 words" in report["not_judged"][0]
    assert [shot["first_frame"] for shot in report["shots"]] == [0, 125]
    assert read_video(out / "video.mp4").shape == (253, 128, 128, 3)
    assert (out / "strip.png").stat().st_size
    assert json.loads((out / "video.json").read_text())["script"]["seed"] == 3
    with Image.open(out / "video.gif") as gif:
        assert gif.n_frames == 127 and gif.width == 256 and gif.height > 256
    printed = capsys.readouterr().out
    assert "not small-world captions" in printed
    names = {"video.mp4", "video.gif", "video.json", "strip.png", "report.json"}
    assert {path.name for path in out.iterdir()} == names
    assert all(str(out / name) in printed for name in names)


def test_a_report_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "make_demo", refuse)
    assert run(["demo", f"--out={tmp_path}", "--steps=1"]) == 1
    assert f"{tmp_path}: cannot be written (No space left on device)" in capsys.readouterr().err


def test_report_of_a_judged_video(tiny_world, tmp_path):
    pipe = Pipeline.from_checkpoint(tiny_world, steps=1)
    script = script_from_prompts([CAPTION, CAPTION.replace("red", "blue")], 0, chunks=4)
    chunk_lengths = []
    files, report = make_demo(
        pipe,
        script,
        tmp_path,
        timer=StageTimer(),
        scale=1,
        hooks=DemoHooks(on_chunk=chunk_lengths.append),
    )
    assert chunk_lengths == [13, 16, 16, 16]
    assert report == json.loads(files.report.read_text())
    assert len(report["judge"]["shots"]) == 2 and report["judge"]["words"]
    assert {"first chunk, with compilation", "later chunks", "writing"} <= set(report["stages"])


def judged_report(*, same_marker):
    shot = {"identity_held": True}
    back = {"same_mark": same_marker, "same_size": True}
    verdict = {"shots": [shot, shot], "returns": [back], "words": ["Captions: 2/2 correct."]}
    return {"seconds": 1.0, "stages": {"loading": 1.0}, "notes": [], "judge": verdict}


@pytest.mark.parametrize(
    ("same_marker", "is_builtin", "explained"),
    [(False, True, True), (True, True, False), (False, False, False)],
)
def test_lost_identity_is_explained_for_the_builtin_model(
    same_marker, is_builtin, explained, capsys
):
    print_report(judged_report(same_marker=same_marker), is_builtin=is_builtin)
    printed = capsys.readouterr().out
    assert "Captions: 2/2 correct." in printed
    assert ("known limit of the built-in model" in printed) == explained


@pytest.mark.parametrize(
    ("size", "scale"), [((64, 64), 6), ((64, 128), 3), ((256, 256), 1), ((704, 1280), 1)]
)
def test_small_videos_are_enlarged(size, scale):
    assert default_scale(size) == scale


def test_enlarged_pixels_are_squares():
    frames = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    big = enlarge(frames, 3)
    assert big.shape == (1, 6, 6, 3) and (big[0, 3:, :3] == frames[0, 1, 0]).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint=/nowhere"], "is not a directory"),
        (["--scale=0"], "--scale must be in [1, 32], got 0"),
        (["--seed=-1"], "--seed must be in [0, 2**32), got -1"),
        (["--out=/proc/demo"], "cannot write"),
        (["--sed=1"], "did you mean '--seed'"),
    ],
)
def test_user_errors_are_one_line(flags, message, capsys, tmp_path):
    out = [] if any("--out" in flag for flag in flags) else [f"--out={tmp_path}"]
    assert run(["demo", *out, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
