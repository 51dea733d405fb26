"""Footage, measuring and reporting, on drawn videos and on random weights."""

import json

import numpy as np
import pytest

from longlive_jax.cli.app import run
from longlive_jax.small_world import held_out
from longlive_jax.small_world import report as reports
from longlive_jax.small_world.cases import EvaluateSpec, cases
from longlive_jax.small_world.evaluator import Footage, measure, psnr, script_of, truth

SHORT = Footage(least_shots=2, chunks=6, shot_chunks=(2, 3), cast=2)


def test_footage_is_held_out_reproducible_and_fills_batches():
    footage = Footage(least_shots=7, chunks=9, shot_chunks=(2, 4), shots=(3, 4), seed=5)
    specs = footage.specs(4)
    assert specs == footage.specs(4) and len(specs) % 4 == 0
    shots = [shot for spec in specs for shot in spec.shots]
    assert len(shots) >= 7 and {len(spec.shots) for spec in specs} <= {3, 4}
    assert all(held_out(s.shape, s.colour, s.background, s.motion) for s in shots)


def test_default_footage_is_what_the_bars_ask_for():
    spec = EvaluateSpec()
    assert sum(len(s.shots) for s in spec.short.specs(spec.batch)) >= 200
    for video in spec.long.specs(spec.batch):
        assert 4 <= len(video.shots) <= 8 and video.chunks * 16 - 3 >= 60 * 24
    returning = spec.returning.specs(spec.batch)
    assert sum(len({s.subject for s in v.shots}) < len(v.shots) for v in returning) > 10


def test_script_has_the_chunks_of_its_description():
    (spec,) = SHORT.specs(1)
    script = script_of(spec, 3)
    assert [(s.prompt, s.chunks) for s in script.shots] == [
        (s.caption, s.chunks) for s in spec.shots
    ]
    assert script.seed == 3


def test_truth_is_right_and_progress_is_told():
    told = []
    result, example = measure(truth, SHORT, batch=1, tick=lambda *now: told.append(now))
    assert result["all_right"]["rate"] == 1 and result["cut_exact"]["rate"] == 1
    assert result["shots"] == sum(len(s.shots) for s in SHORT.specs(1))
    assert len(example.shots) == len(example.captions) >= 2
    assert told[-1] == (result["videos"], result["videos"])
    assert told == sorted(told)
    assert set(result["returns"]) == {"of_first_shot", "of_later_shots"}


def test_wrong_pixels_are_not_right():
    def gray(specs, seeds):
        for video in truth(specs, seeds):
            yield np.zeros_like(video)

    result, _ = measure(gray, SHORT, batch=1)
    assert result["all_right"]["rate"] == 0


@pytest.mark.parametrize(("error", "decibels"), [(4.0, 0.0), (0.04, 20.0)])
def test_psnr(error, decibels):
    assert psnr(error) == pytest.approx(decibels)


def test_every_case_once():
    names = [case.name for case in cases(EvaluateSpec())]
    assert len(set(names)) == len(names) == 10
    assert {case.part for case in cases(EvaluateSpec())} == {"ceilings", "steps", "long", "sinks"}


@pytest.fixture
def command(tiny_world, tmp_path):
    small = "{'least_shots': 2, 'chunks': 3, 'shot_chunks': (1, 2), 'shots': (2, 2), 'cast': 2}"
    footage = [f"--config.evaluate.{name}={small}" for name in ("short", "long", "returning")]
    settings = ["--config.evaluate.batch=1", "--config.evaluate.sample.steps=1"]
    fewer = ["--config.evaluate.fewer_steps=(2,)"]
    where = [f"--checkpoint={tiny_world}", f"--out={tmp_path / 'out'}"]
    return ["evaluate", *footage, *settings, *fewer, *where]


def test_evaluation_of_random_weights(command, tmp_path, capsys):
    assert run([*command, "--parts=ceilings,steps"]) == 0
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    assert list(report["cases"]) == ["truth", "vae", "shots", "2 steps"]
    assert report["cases"]["truth"]["all_right"]["rate"] == 1
    assert report["cases"]["vae"]["psnr"] < 32 and report["about"]["weights"]
    said = capsys.readouterr().out
    assert "| truth | – | 2 |" in said and "Below the bar" in said
    assert {"report.md", "rates.png", "shots.png", "2_steps.png"} <= {p.name for p in out.iterdir()}


def test_finished_cases_are_kept_and_changed_ones_measured_again(command, tmp_path):
    path = tmp_path / "out" / "report.json"
    assert run([*command, "--parts=ceilings"]) == 0
    report = json.loads(path.read_text())
    report["cases"]["truth"]["shots"] = 99
    path.write_text(json.dumps(report))
    assert run([*command, "--parts=ceilings"]) == 0
    assert json.loads(path.read_text())["cases"]["truth"]["shots"] == 99
    assert run([*command, "--parts=ceilings", "--config.evaluate.short.seed=1"]) == 0
    assert json.loads(path.read_text())["cases"]["truth"]["shots"] == 2


def test_weights_and_settings_are_compared_on_the_same_footage(command, tiny_world, tmp_path):
    footage = "--config.evaluate.comparison={'least_shots': 2, 'chunks': 3, 'shot_chunks': (1, 2)}"
    rows = [{"name": "one"}, {"name": "elsewhere", "checkpoint": str(tiny_world)}]
    compared = f"--config.evaluate.compared={rows}"
    assert run([*command, footage, compared, "--parts=compared"]) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())["cases"]
    assert list(found) == ["one", "elsewhere"]
    for key in ("asked", "quarters"):
        assert found["one"][key] == found["elsewhere"][key]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--parts=sink", "did you mean 'sinks'"),
        ("--checkpoint=/nowhere", "no such checkpoint"),
        ("--config.evaluate.bach=2", "did you mean 'batch'"),
        ("--config.evaluate.sample.stepz=2", "did you mean 'steps'"),
        ("--config.evaluate.batch=0", "at least one video"),
        ("--config.evaluate.compared=[{'name': 'minute'}]", "a name of its own"),
    ],
)
def test_mistakes(command, word, message, capsys):
    assert run([*command, word]) == 2
    assert message in capsys.readouterr().err


def test_foreign_report_is_not_overwritten(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("[]")
    assert run([*command, "--parts=ceilings"]) == 2
    assert "no report of ours" in capsys.readouterr().err


def test_bars_compare_what_was_measured():
    entry = {"rate": 0.95, "n": 1, "low": 0, "high": 1}
    case = dict.fromkeys(
        ("shape", "colour", "background", "motion", "all_right", "cut_exact"), entry
    )
    found = {
        (name, key): ok for name, key, _, _, ok in reports.judgements({"cases": {"shots": case}})
    }
    assert (
        found["shots", "shape"] and found["shots", "all_right"] and not found["shots", "cut_exact"]
    )
