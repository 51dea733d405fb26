"""What the demo shows, and what the judge makes of it in plain words."""

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
"""253 frames at 24 a second: ten and a half seconds."""


def held_out_story(seed: int, *, chunks: int = CHUNKS, shots: int = 4) -> ShotScript:
    """A script of captions that training never showed, in which one subject leaves and returns."""
    rng = np.random.default_rng(seed)
    limits = (max(1, chunks // shots - 1), chunks // shots + 1)
    while True:
        spec = sample_spec(
            rng, chunks=chunks, split="held_out", shot_chunks=limits, shots=shots, cast=2
        )
        if _returning(spec):
            shots_ = tuple(Shot(shot.caption, chunks=shot.chunks) for shot in spec.shots)
            return ShotScript(shots_, seed=seed, name="demo")


def story_of(prompts: Sequence[str], seed: int, *, chunks: int = CHUNKS) -> ShotScript:
    """The user's own shots, equally long, together at least as long as the built-in story."""
    each = -(-chunks // len(prompts))
    return ShotScript(tuple(Shot(p, chunks=each) for p in prompts), seed=seed, name="demo")


def _returning(spec: VideoSpec) -> bool:
    """Whether the first subject is away for a whole shot and comes back later."""
    first = spec.shots[0].subject
    away = [shot.subject != first for shot in spec.shots]
    return True in away and False in away[away.index(True) :]


def strangers(prompts: Sequence[str]) -> list[str]:
    """Why the judge cannot judge, one line for every prompt that is no caption of its world."""
    found = []
    for prompt in prompts:
        try:
            parse_caption(prompt)
        except ValueError as error:
            found.append(str(error))
    return found


def judge(
    frames: UInt8[np.ndarray, "f h w 3"],
    prompts: Sequence[str],
    bounds: Sequence[tuple[int, int]],
) -> VideoVerdict | None:
    """The verdict on a video of these shots; None if a prompt is no caption of the small world."""
    if strangers(prompts):
        return None
    return judge_video(to_pixels(frames), prompts, bounds)


def in_words(verdict: VideoVerdict) -> Iterator[str]:
    """One line a shot, then cuts, returning subjects and the sum."""
    for number, shot in enumerate(verdict.shots, 1):
        yield f"shot {number}: {shot.caption}: {_opinion(shot)}"
    for number, cut in enumerate(verdict.cuts, 1):
        if not cut.exact:
            where = "is not visible" if cut.found is None else f"shows on frame {cut.found}"
            yield f"cut {number} {where}; it belongs on frame {cut.expected}"
    if verdict.cuts and all(cut.exact for cut in verdict.cuts):
        yield f"all {len(verdict.cuts)} cuts fall on their frames"
    if verdict.extra_cuts:
        yield f"the picture jumps without a cut on frames {', '.join(map(str, verdict.extra_cuts))}"
    for back in verdict.returns:
        yield f"shot {back.again + 1} brings back the subject of shot {back.first + 1}: " + (
            "same mark and size" if back.held else _lost(back.same_mark, back.same_size)
        )
    right = sum(shot.all_right for shot in verdict.shots)
    yield f"{right} of {len(verdict.shots)} shots show everything their captions say"


def _opinion(shot: ShotVerdict) -> str:
    meant: Scene = parse_caption(shot.caption)
    wrong = [
        f"{kind} is {shot.shown[kind] or 'unclear'} instead of {getattr(meant, kind)}"
        for kind, right in shot.right.items()
        if not right
    ]
    if not shot.identity_held:
        wrong.append("the subject changes within the shot")
    return ", ".join(wrong) or "right"


def _lost(same_mark: bool, same_size: bool) -> str:
    lost = [word for word, same in (("mark", same_mark), ("size", same_size)) if not same]
    return f"another {' and '.join(lost)}"


def plain(value: Any) -> Any:
    """The same in what JSON has: lists for tuples, null for what is no number."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def as_json(verdict: VideoVerdict | None) -> dict | None:
    """Numbers and words of a verdict."""
    if verdict is None:
        return None
    return plain(
        {
            **dataclasses.asdict(verdict),
            "drift": verdict.drift,
            "shots_all_right": sum(shot.all_right for shot in verdict.shots),
            "cuts_exact": sum(cut.exact for cut in verdict.cuts),
            "words": list(in_words(verdict)),
        }
    )
