"""Notes on what is stated without effect."""

import argparse
import types

import pytest

from longlive_jax.cli import effects
from longlive_jax.sampling.script import Shot, ShotScript
from longlive_jax.sampling.settings import SampleSpec
from longlive_jax.training.optim import OptimSpec

TWO_SHOTS = ShotScript((Shot("a", chunks=1), Shot("b", chunks=1)))
ONE_SHOT = ShotScript((Shot("a", chunks=1), Shot("b", chunks=1, cut=False)))


def notes(capsys, given, *, scripts=(TWO_SHOTS,), spec=None, script="shots.yaml", **args):
    args = {"script": script, "batch": 1, "video": None, "video_cuts": None} | args
    run = effects.SampleRun(spec or SampleSpec(), scripts, argparse.Namespace(**args))
    effects.note_sample({name: f"<{name}>" for name in given}, run)
    return capsys.readouterr().err


def test_what_has_an_effect_is_not_mentioned(capsys, tmp_path):
    spec = SampleSpec(guidance=2.0, kv="nvfp4")
    given = ["sample.negative_prompt", "sample.kv_reader", "sample.shot_rope_offset", "sample.size"]
    assert notes(capsys, [*given, "--out", "sample.steps"], spec=spec) == ""
    assert notes(capsys, ["--chunks"], script="lines.txt") == ""
    assert notes(capsys, ["--chunks_per_shot"], script=str(tmp_path)) == ""
    past = {"scripts": (ONE_SHOT,), "video": "a.mp4"}
    assert notes(capsys, ["sample.cut_prefix"], **past, video_cuts="48") == ""
    begins = ShotScript((Shot("a", chunks=1, cut=True),))
    assert notes(capsys, ["sample.cut_prefix"], **past | {"scripts": (begins,)}) == ""


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("--chunks", {}, "shots.yaml states the durations"),
        ("--chunks_per_shot", {"script": "a.txt"}, "only caption folders use it"),
        ("--batch", {"batch": 4}, "shots.yaml describes one video"),
        ("sample.negative_prompt", {}, "guidance is 1"),
        ("sample.kv_smoothing", {}, "kv is model; set --kv=nvfp4"),
        ("sample.shot_rope_offset", {"scripts": (ONE_SHOT,)}, "there is no cut"),
        ("sample.cut_prefix", {"scripts": (ONE_SHOT,), "video": "a.mp4"}, "there is no cut"),
        (
            "sample.size",
            {"scripts": (ShotScript(ONE_SHOT.shots, size=(64, 64)),)},
            "shots.yaml states its own size",
        ),
        (
            "sample.negative_prompt",
            {
                "scripts": (ShotScript(ONE_SHOT.shots, negative_prompt="x"),),
                "spec": SampleSpec(guidance=2.0),
            },
            "states its own",
        ),
    ],
)
def test_sampling(name, settings, reason, capsys):
    text = notes(capsys, [name], **settings)
    assert text.startswith(f"note: <{name}> has no effect: ") and reason in text
    assert text.count("\n") == 1


def test_few_steps_of_a_solver_that_needs_many(capsys):
    assert notes(capsys, [], spec=SampleSpec(solver="sde", steps=32)) == ""
    assert notes(capsys, [], spec=SampleSpec(solver="unipc", steps=2)) == ""
    text = notes(capsys, [], spec=SampleSpec(solver="sde", steps=2))
    assert text == "note: solver sde needs 16 steps or more, got 2; use --solver=unipc for fewer\n"


def test_a_negative_prompt_of_the_script(capsys):
    text = notes(capsys, [], scripts=(ShotScript(ONE_SHOT.shots, negative_prompt="x"),))
    assert text.startswith("note: negative_prompt of shots.yaml has no effect: guidance is 1")


def test_shot_durations_win(capsys, tmp_path):
    (tmp_path / "caption" / "a").mkdir(parents=True)
    (tmp_path / "caption" / "a" / "shot_durations.txt").write_text("1 2")
    text = notes(capsys, ["--chunks_per_shot"], script=str(tmp_path))
    assert "shot_durations.txt states the durations" in text


def test_training(capsys):
    stage = types.SimpleNamespace(optim=OptimSpec(name="adamw"))
    effects.note_train({"optim.adam_lr": "--config.optim.adam_lr", "optim.lr": "--lr"}, stage)
    assert capsys.readouterr().err == (
        "note: --config.optim.adam_lr has no effect: optim.name is adamw, not muon\n"
    )


def test_evaluation_parts(capsys):
    given = {name: name for name in ("evaluate.long.chunks", "evaluate.short.seed")}
    effects.note_evaluate(given, types.SimpleNamespace(tables=()), ["steps"])
    assert capsys.readouterr().err == (
        "note: evaluate.long.chunks has no effect: only long uses it, and --parts is steps\n"
    )


def test_every_rule_names_known_settings():
    """A renamed setting must not leave a rule behind that never applies."""
    from longlive_jax.cli.setting_groups import all_groups

    known = {row.path for group in all_groups() for row in group.rows}
    rules = (*effects.SAMPLE_RULES, *effects.TRAIN_RULES, *effects.EVALUATE_RULES)
    names = {name for rule in rules for name in rule.settings} | set(effects.PARTS_OF_SETTINGS)
    assert {name for name in names if not name.startswith("--")} <= known
