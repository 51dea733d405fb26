"""The demo's scripts, and the judge's verdict as text and JSON."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from longlive_jax.io.pictures import to_pixels
from longlive_jax.sampling.script import Shot, ShotScript
from longlive_jax.small_world import VideoSpec, sample_spec
from longlive_jax.small_world.judge import ShotVerdict, VideoVerdict, judge_video
from longlive_jax.small_world.words import Scene, parse_caption
from longlive_jax.typing import UInt8

CHUNKS = 16
"""Length of the demo: 253 frames, 10.5 seconds at 24 frames per second."""


def held_out_script(seed: int, *, chunks: int = CHUNKS, shots: int = 4) -> ShotScript:
    """A random script of held-out captions in which the first subject leaves and returns."""
    rng = np.random.default_rng(seed)
    limits = (max(1, chunks // shots - 1), chunks // shots + 1)
    while True:
        spec = sample_spec(
            rng, chunks=chunks, split="held_out", shot_chunks=limits, shots=shots, max_subjects=2
        )
        if _returning(spec):
            script_shots = tuple(Shot(shot.caption, chunks=shot.chunks) for shot in spec.shots)
            return ShotScript(script_shots, seed=seed, name="demo")


def script_from_prompts(prompts: Sequence[str], seed: int, *, chunks: int = CHUNKS) -> ShotScript:
    """A script of equally long shots with these prompts, at least `chunks` chunks in total."""
    each = -(-chunks // len(prompts))
    return ShotScript(tuple(Shot(p, chunks=each) for p in prompts), seed=seed, name="demo")


def _returning(spec: VideoSpec) -> bool:
    """Whether the first subject is absent for at least one shot and returns later."""
    first = spec.shots[0].subject
    away = [shot.subject != first for shot in spec.shots]
    return True in away and False in away[away.index(True) :]


def unknown_prompts(prompts: Sequence[str]) -> list[str]:
    """One error message for every prompt that is not a small-world caption."""
    errors = []
    for prompt in prompts:
        try:
            parse_caption(prompt)
        except ValueError as error:
            errors.append(str(error))
    return errors


def judge(
    frames: UInt8[np.ndarray, "f h w 3"],
    prompts: Sequence[str],
    bounds: Sequence[tuple[int, int]],
) -> VideoVerdict | None:
    """The verdict on a video of these shots; None if a prompt is not a small-world caption."""
    if unknown_prompts(prompts):
        return None
    return judge_video(to_pixels(frames), prompts, bounds)


def verdict_lines(verdict: VideoVerdict) -> Iterator[str]:
    """The verdict as text: one line per shot, wrong cuts, and counts of what is correct."""
    # Details.
    for number, shot in enumerate(verdict.shots, 1):
        yield f"Shot {number}: {shot.caption}: {_mistakes(shot)}."
    for number, cut in enumerate(verdict.cuts, 1):
        if not cut.exact:
            where = "is not visible" if cut.frame is None else f"is on frame {cut.frame}"
            yield f"Cut {number} {where}; the script has it on frame {cut.expected}."
    if verdict.extra_cuts:
        yield f"Cuts that are not in the script: frames {', '.join(map(str, verdict.extra_cuts))}."
    # Counts.
    shots, cuts, returns = verdict.shots, verdict.cuts, verdict.returns
    yield f"Captions: {sum(shot.shows_caption for shot in shots)}/{len(shots)} correct."
    if cuts:
        yield f"Cuts: {sum(cut.exact for cut in cuts)}/{len(cuts)} on the right frame."
    constant = sum(shot.identity_held for shot in shots)
    identity = f"Identity: {constant}/{len(shots)} shots keep marker, size, shape and colour"
    if returns:
        same = sum(back.same_identity for back in returns)
        identity += f"; {same}/{len(returns)} returning subjects have their earlier marker and size"
    yield f"{identity}."


def _mistakes(shot: ShotVerdict) -> str:
    """The attributes that differ from the caption, or "correct"."""
    expected: Scene = parse_caption(shot.caption)
    mistakes = [
        f"{kind} is {shot.observed[kind] or 'unclear'} instead of {getattr(expected, kind)}"
        for kind, correct in shot.correct.items()
        if not correct and (shot.hidden is None or shot.observed[kind] is not None)
    ]
    if shot.hidden is not None:
        first, end = shot.hidden
        mistakes.append(f"no subject is visible in frames {first} to {end - 1}")
    return ", ".join(mistakes) or "correct"


def json_safe(value: Any) -> Any:
    """The value in types that JSON has: lists for tuples, null for non-finite numbers."""
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def verdict_json(verdict: VideoVerdict | None) -> dict | None:
    """The entry `judge` of the demo's report.json; None without a verdict."""
    if verdict is None:
        return None
    return json_safe(
        {
            **dataclasses.asdict(verdict, dict_factory=_with_report_keys),
            "drift": verdict.drift,
            "shots_all_right": sum(shot.shows_caption for shot in verdict.shots),
            "cuts_exact": sum(cut.exact for cut in verdict.cuts),
            "words": list(verdict_lines(verdict)),
        }
    )


_REPORT_KEYS = {
    "observed": "shown",
    "correct": "right",
    "marker": "mark",
    "frame": "found",
    "same_marker": "same_mark",
    "segments": "pieces",
    "segments_correct": "pieces_right",
}
"""Fields of verdicts -> their keys in report.json, where the two differ."""


def _with_report_keys(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Dictionary factory of `dataclasses.asdict` for verdicts."""
    return {_REPORT_KEYS.get(name, name): value for name, value in fields}
