"""Evaluation sets, measurements and reports, on ground-truth videos and with random weights."""

import json

import numpy as np
import pytest

from longlive_jax.cli.app import run
from longlive_jax.small_world import held_out
from longlive_jax.small_world import report as reports
from longlive_jax.small_world.cases import EvaluateSpec, cases
from longlive_jax.small_world.evaluator import (
    EvaluationSet,
    ground_truth,
    measure,
    psnr_of_mse,
    script_of,
)

SHORT = EvaluationSet(least_shots=2, chunks=6, shot_chunks=(2, 3), cast=2)


def test_an_evaluation_set_is_held_out_reproducible_and_fills_batches():
    evaluation_set = EvaluationSet(
        least_shots=7, chunks=9, shot_chunks=(2, 4), shots=(3, 4), seed=5
    )
    specs = evaluation_set.specs(4)
    assert specs == evaluation_set.specs(4) and len(specs) % 4 == 0
    shots = [shot for spec in specs for shot in spec.shots]
    assert len(shots) >= 7 and {len(spec.shots) for spec in specs} <= {3, 4}
    assert all(held_out(s.shape, s.colour, s.background, s.motion) for s in shots)


def test_default_evaluation_sets_have_the_shots_that_the_targets_need():
    spec = EvaluateSpec()
    assert sum(len(s.shots) for s in spec.short.specs(spec.batch)) >= 200
    for video in spec.long.specs(spec.batch):
        assert 4 <= len(video.shots) <= 8 and video.chunks * 16 - 3 >= 60 * 24
    returning = spec.returning.specs(spec.batch)
    assert sum(len({s.subject for s in v.shots}) < len(v.shots) for v in returning) > 10


def test_a_script_has_the_shots_of_its_description():
    (spec,) = SHORT.specs(1)
    script = script_of(spec, 3)
    assert [(s.prompt, s.chunks) for s in script.shots] == [
        (s.caption, s.chunks) for s in spec.shots
    ]
    assert script.seed == 3


def test_ground_truth_is_correct_and_progress_is_reported():
    progress = []
    result, example = measure(
        ground_truth, SHORT, batch=1, on_progress=lambda *now: progress.append(now)
    )
    assert result["all_right"]["rate"] == 1 and result["cut_exact"]["rate"] == 1
    assert result["shots"] == sum(len(s.shots) for s in SHORT.specs(1))
    assert len(example.shots) == len(example.captions) >= 2
    assert progress[-1] == (result["videos"], result["videos"])
    assert progress == sorted(progress)
    assert set(result["returns"]) == {"of_first_shot", "of_later_shots"}


def test_gray_videos_have_no_correct_shot():
    def gray(specs, seeds):
        for video in ground_truth(specs, seeds):
            yield np.zeros_like(video)

    result, _ = measure(gray, SHORT, batch=1)
    assert result["all_right"]["rate"] == 0


@pytest.mark.parametrize(("error", "decibels"), [(4.0, 0.0), (0.04, 20.0)])
def test_psnr(error, decibels):
    assert psnr_of_mse(error) == pytest.approx(decibels)


def test_case_names_are_unique():
    names = [case.name for case in cases(EvaluateSpec())]
    assert len(set(names)) == len(names) == 10
    assert {case.part for case in cases(EvaluateSpec())} == {"ceilings", "steps", "long", "sinks"}


@pytest.fixture
def command(tiny_world, tmp_path):
    small = "{'least_shots': 2, 'chunks': 3, 'shot_chunks': (1, 2), 'shots': (2, 2), 'cast': 2}"
    sets = [f"--config.evaluate.{name}={small}" for name in ("short", "long", "returning")]
    settings = ["--config.evaluate.batch=1", "--config.evaluate.sample.steps=1"]
    fewer = ["--config.evaluate.fewer_steps=(2,)"]
    paths = [f"--checkpoint={tiny_world}", f"--out={tmp_path / 'out'}"]
    return ["evaluate", *sets, *settings, *fewer, *paths]


def test_evaluation_of_random_weights(command, tmp_path, capsys):
    assert run([*command, "--parts=ceilings,steps"]) == 0
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    assert list(report["cases"]) == ["truth", "vae", "shots", "2 steps"]
    assert report["cases"]["truth"]["all_right"]["rate"] == 1
    assert report["cases"]["vae"]["psnr"] < 32 and report["about"]["weights"]
    printed = capsys.readouterr().out
    assert "| truth | – | 2 |" in printed and "Targets missed: vae: " in printed
    assert "caption accuracy | cut timing | identity kept in shot" in printed
    assert {"report.md", "rates.png", "shots.png", "2_steps.png"} <= {p.name for p in out.iterdir()}


def test_finished_cases_are_reused_and_changed_ones_measured_again(command, tmp_path):
    path = tmp_path / "out" / "report.json"
    assert run([*command, "--parts=ceilings"]) == 0
    report = json.loads(path.read_text())
    report["cases"]["truth"]["shots"] = 99
    path.write_text(json.dumps(report))
    assert run([*command, "--parts=ceilings"]) == 0
    assert json.loads(path.read_text())["cases"]["truth"]["shots"] == 99
    assert run([*command, "--parts=ceilings", "--config.evaluate.short.seed=1"]) == 0
    assert json.loads(path.read_text())["cases"]["truth"]["shots"] == 2


def test_weights_and_settings_are_compared_on_the_same_videos(command, tiny_world, tmp_path):
    comparison = "{'least_shots': 2, 'chunks': 3, 'shot_chunks': (1, 2)}"
    videos = f"--config.evaluate.comparison={comparison}"
    rows = [{"name": "one"}, {"name": "elsewhere", "checkpoint": str(tiny_world)}]
    compared = f"--config.evaluate.compared={rows}"
    assert run([*command, videos, compared, "--parts=compared"]) == 0
    results = json.loads((tmp_path / "out" / "report.json").read_text())["cases"]
    assert list(results) == ["one", "elsewhere"]
    for key in ("asked", "quarters"):
        assert results["one"][key] == results["elsewhere"][key]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--parts=sink", "did you mean 'sinks'"),
        ("--checkpoint=/nowhere", "is not a directory"),
        ("--config.evaluate.bach=2", "did you mean 'batch'"),
        ("--config.evaluate.sample.stepz=2", "did you mean 'steps'"),
        ("--config.evaluate.batch=0", "batch must be >= 1, got 0"),
        ("--config.evaluate.compared=[{'name': 'minute'}]", "needs a unique name"),
    ],
)
def test_user_errors(command, flag, message, capsys):
    assert run([*command, flag]) == 2
    assert message in capsys.readouterr().err


def test_foreign_report_is_not_overwritten(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("[]")
    assert run([*command, "--parts=ceilings"]) == 2
    assert "is not a report of `longlive evaluate`" in capsys.readouterr().err


def test_a_report_without_json_is_not_overwritten(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("# Report")
    assert run([*command, "--parts=ceilings"]) == 2
    assert "is not a report (" in capsys.readouterr().err


def test_targets_are_compared_with_measured_rates():
    entry = {"rate": 0.95, "n": 1, "low": 0, "high": 1}
    case = dict.fromkeys(
        ("shape", "colour", "background", "motion", "all_right", "cut_exact"), entry
    )
    is_met = {
        key: is_met for _, key, _, _, is_met in reports.target_results({"cases": {"shots": case}})
    }
    assert is_met["shape"] and is_met["all_right"] and not is_met["cut_exact"]
