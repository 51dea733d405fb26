"""Notes on settings without any effect, and on too few steps for a solver.

A rule says when some settings do nothing. For rules, only what the command line states is looked
at: recipes state more than a single command needs.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlive_jax.cli.notes import print_notes

if TYPE_CHECKING:
    from longlive_jax.sampling.script import ShotScript
    from longlive_jax.sampling.settings import SampleSpec

PARTS_OF_SETTINGS = {
    "evaluate.fewer_steps": ("steps",),
    "evaluate.fewer_solver": ("steps",),
    "evaluate.short": ("ceilings", "steps"),
    "evaluate.long": ("long",),
    "evaluate.returning": ("sinks",),
    "evaluate.compared": ("compared",),
    "evaluate.comparison": ("compared",),
    "evaluate.runs": ("compared",),
}
"""Setting -> the parts of an evaluation that use it."""

SDE_STEPS = 16
"""Fewest steps for the solver "sde"; fewer do not remove the noise that it adds between them."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """When settings have no effect.

    Attributes:
      settings: dotted names, of settings or of groups, or options such as `--chunks`.
      reason: run -> why they have no effect, or None if they have.
    """

    settings: tuple[str, ...]
    reason: Callable[[Any], str | None]


@dataclasses.dataclass(frozen=True)
class SampleRun:
    """What `longlive sample` is about to do.

    Attributes:
      spec: the sampling settings.
      scripts: the scripts.
      args: the options.
    """

    spec: "SampleSpec"
    scripts: Sequence["ShotScript"]
    args: argparse.Namespace

    @property
    def has_cuts(self) -> bool:
        """Whether any video has a cut, the one to continue included."""
        continues = self.args.video is not None
        return bool(self.args.video_cuts) or any(
            script.is_cut(i, continues=continues)
            for script in self.scripts
            for i in range(len(script.shots))
        )


def ineffective(given: Mapping[str, str], rules: Sequence[Rule], run: Any) -> list[str]:
    """One line for every setting in `given` (name -> how it is stated) that has no effect."""
    lines = []
    for name, stated in given.items():
        for rule in rules:
            if not any(f"{name}.".startswith(f"{setting}.") for setting in rule.settings):
                continue
            reason = rule.reason(run)
            if reason is not None:
                lines.append(f"{stated} has no effect: {reason}")
                break
    return lines


def print_ineffective(given: Mapping[str, str], rules: Sequence[Rule], run: Any) -> None:
    """Prints the lines of `ineffective` as notes."""
    print_notes(ineffective(given, rules, run))


def note_sample(given: Mapping[str, str], run: SampleRun) -> None:
    """Prints notes on settings of `longlive sample`, and of its scripts, without effect."""
    if any(script.negative_prompt for script in run.scripts):
        given = {"sample.negative_prompt": f"negative_prompt of {run.args.script}"} | dict(given)
    print_ineffective(given, SAMPLE_RULES, run)
    if run.spec.solver == "sde" and run.spec.steps < SDE_STEPS:
        print_notes(
            [
                f"solver sde needs {SDE_STEPS} steps or more, got {run.spec.steps}; use "
                "--solver=unipc for fewer"
            ]
        )


def note_train(given: Mapping[str, str], stage: Any) -> None:
    """Prints notes on settings of a training stage without effect."""
    print_ineffective(given, TRAIN_RULES, stage)


def note_evaluate(given: Mapping[str, str], spec: Any, parts: Sequence[str]) -> None:
    """Prints notes on settings of an evaluation without effect."""
    if {table.name for table in spec.tables} & set(parts):  # their rows are those of `compared`
        parts = [*parts, "compared"]
    rules = [
        Rule((name,), functools.partial(_unused, users, parts))
        for name, users in PARTS_OF_SETTINGS.items()
    ]
    print_ineffective(given, [*rules, *EVALUATE_RULES], spec)


def _unused(users: Sequence[str], parts: Sequence[str], run: Any) -> str | None:
    """Why a setting of the parts `users` has no effect in a run of `parts`, or None."""
    if set(users) & set(parts):
        return None
    uses = "uses" if len(users) == 1 else "use"
    return f"only {' and '.join(users)} {uses} it, and --parts is {','.join(parts)}"


def _if(is_so: Callable[[Any], bool], reason: str) -> Callable[[Any], str | None]:
    """`reason`, formatted with the run as `run`, where `is_so`."""
    return lambda run: reason.format(run=run) if is_so(run) else None


def _is_file(run: SampleRun) -> bool:
    return Path(run.args.script).suffix.lower() in (".yaml", ".yml", ".json")


def _has_durations(run: SampleRun) -> bool:
    """Whether every video of a caption folder has its `shot_durations.txt`."""
    files = sum(1 for _ in Path(run.args.script).rglob("shot_durations.txt"))
    return files >= len(run.scripts)


SAMPLE_RULES = (
    Rule(
        ("--chunks", "--chunks_per_shot"),
        _if(_is_file, "{run.args.script} states the durations of its shots"),
    ),
    Rule(
        ("--chunks_per_shot",),
        _if(lambda run: not Path(run.args.script).is_dir(), "only caption folders use it"),
    ),
    Rule(
        ("--chunks_per_shot",),
        _if(_has_durations, "shot_durations.txt states the durations"),
    ),
    Rule(
        ("--batch",),
        _if(
            lambda run: run.args.batch > len(run.scripts) == 1,
            "{run.args.script} describes one video",
        ),
    ),
    Rule(
        ("sample.negative_prompt",),
        _if(
            lambda run: run.spec.guidance == 1,
            "guidance is 1, which uses no negative prompt; set --guidance above 1",
        ),
    ),
    Rule(
        ("sample.negative_prompt",),
        _if(
            lambda run: all(script.negative_prompt is not None for script in run.scripts),
            "{run.args.script} states its own",
        ),
    ),
    Rule(
        ("sample.size",),
        _if(
            lambda run: all(script.size is not None for script in run.scripts),
            "{run.args.script} states its own size",
        ),
    ),
    Rule(
        ("sample.kv_smoothing", "sample.kv_reader"),
        _if(lambda run: run.spec.kv == "model", "kv is model; set --kv=nvfp4"),
    ),
    Rule(
        ("sample.shot_rope_offset", "sample.clean_recache", "sample.cut_prefix"),
        _if(lambda run: not run.has_cuts, "there is no cut"),
    ),
)
"""Rules on a `SampleRun`."""

TRAIN_RULES = (
    Rule(
        ("optim.adam_lr",),
        _if(lambda stage: stage.optim.name != "muon", "optim.name is {run.optim.name}, not muon"),
    ),
    Rule(
        ("ema.decay",),
        _if(
            lambda stage: stage.ema is not None and stage.ema.start >= stage.loop.steps,
            "the EMA starts at step {run.ema.start} of {run.loop.steps}",
        ),
    ),
    Rule(
        ("preview.seconds", "preview.seed"),
        _if(lambda stage: not stage.preview.prompts, "preview.prompts is empty"),
    ),
    Rule(
        ("quant.implementation",),
        _if(lambda stage: stage.quant.policy == "none", "quant.policy is none"),
    ),
    Rule(
        ("loss.context_noise_told",),
        _if(lambda stage: stage.loss.context_noise == 0, "loss.context_noise is 0"),
    ),
    Rule(
        ("anywhere",),
        _if(
            lambda stage: stage.videos is None or stage.clips is None,
            "the clips are encoded before training, not while it runs",
        ),
    ),
    Rule(
        ("held_out_batches",),
        _if(lambda stage: getattr(stage, "held_out", "") is None, "held_out is none"),
    ),
)
"""Rules on a training stage, for settings that it has."""

EVALUATE_RULES = (
    Rule(
        ("evaluate.fewer_solver",),
        _if(lambda spec: not spec.fewer_steps, "evaluate.fewer_steps is empty"),
    ),
    Rule(
        ("evaluate.comparison", "evaluate.runs"),
        _if(lambda spec: not spec.compared, "evaluate.compared is empty"),
    ),
)
"""Rules on an `EvaluateSpec`."""
