"""The demo's scripts, and verdicts on rendered videos as text and JSON."""

import itertools

import numpy as np
import pytest

from longlive_jax.io.pictures import to_uint8
from longlive_jax.small_world import (
    demo_script,
    frame_bounds,
    held_out,
    parse_caption,
    render,
    sample_spec,
)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_the_builtin_script_is_held_out_and_a_subject_returns(seed):
    script = demo_script.held_out_script(seed)
    scenes = [parse_caption(shot.prompt) for shot in script.shots]
    assert len(scenes) >= 3 and sum(shot.chunks for shot in script.shots) == demo_script.CHUNKS
    assert all(held_out(s.shape, s.colour, s.background, s.motion) for s in scenes)
    subjects = [(s.shape, s.colour) for s in scenes]
    runs = [key for key, _ in itertools.groupby(subjects)]
    assert runs.count(subjects[0]) > 1
    assert demo_script.held_out_script(seed) == script


def test_a_script_from_prompts_is_at_least_as_long():
    script = demo_script.script_from_prompts(["a", "b", "c"], 3)
    assert [shot.prompt for shot in script.shots] == ["a", "b", "c"]
    assert sum(shot.chunks for shot in script.shots) >= demo_script.CHUNKS


def rendered(seed=0):
    """Frames, captions and shot bounds of a ground-truth video of three shots."""
    rng = np.random.default_rng(seed)
    spec = sample_spec(rng, chunks=9, shots=3, shot_chunks=(3, 3), max_subjects=2)
    return to_uint8(render(spec)), list(spec.captions), frame_bounds(spec)


def test_lines_about_a_ground_truth_video():
    verdict = demo_script.judge(*rendered())
    lines = list(demo_script.verdict_lines(verdict))
    assert lines[0].startswith("Shot 1: ") and lines[0].endswith(": correct.")
    assert [line.split(".")[0].split(";")[0] + "." for line in lines[3:]] == [
        "Captions: 3/3 correct.",
        "Cuts: 2/2 on the right frame.",
        "Identity: 3/3 shots keep marker, size, shape and colour.",
    ]


def test_lines_name_mistakes():
    frames, captions, bounds = rendered()
    shape = parse_caption(captions[0]).shape
    other = "circle" if shape != "circle" else "square"
    captions[0] = captions[0].replace(shape, other)
    frames[bounds[1][0] : bounds[1][0] + 8] = frames[0]  # the first cut comes late
    lines = "\n".join(demo_script.verdict_lines(demo_script.judge(frames, captions, bounds)))
    assert f"shape is {shape} instead of {other}" in lines
    assert f"the script has it on frame {bounds[1][0]}" in lines
    assert "Captions: 2/3 correct." in lines and "Cuts: 1/2 on the right frame." in lines


def test_a_subject_that_leaves_is_a_mistake():
    """Most frames of the shot are as in the caption, and the rest are empty."""
    frames, captions, bounds = rendered()
    first, end = bounds[2][1] - 20, bounds[2][1]
    frames[first:end] = np.median(frames[first].reshape(-1, 3), axis=0)
    verdict = demo_script.judge(frames, captions, bounds)
    assert [shot.hidden for shot in verdict.shots] == [None, None, (first, end)]
    assert verdict.shots[2].caption_correct and not verdict.shots[2].shows_caption
    lines = list(demo_script.verdict_lines(verdict))
    assert f"no subject is visible in frames {first} to {end - 1}" in lines[2]
    assert "Captions: 2/3 correct." in lines
    assert demo_script.verdict_json(verdict)["shots_all_right"] == 2


def test_json_of_a_verdict_has_the_keys_of_the_report():
    verdict = demo_script.verdict_json(demo_script.judge(*rendered()))
    assert set(verdict) == {
        "shots", "cuts", "returns", "extra_cuts", "quarters", "drift", "shots_all_right",
        "cuts_exact", "words",
    }  # fmt: skip
    assert set(verdict["shots"][0]) == {
        "caption", "start", "stop", "shown", "right", "mark", "radius", "velocity",
        "identity_held", "hidden",
    }  # fmt: skip
    assert set(verdict["shots"][0]["shown"]) == {"shape", "colour", "background", "motion"}
    assert set(verdict["cuts"][0]) == {"expected", "found"}
    assert set(verdict["quarters"][0]) == {
        "error", "overlap", "sharpness", "pieces", "pieces_right"
    }  # fmt: skip


def test_prompts_outside_the_small_world_are_not_judged():
    frames, captions, bounds = rendered()
    captions[1] = "a dog runs"
    assert demo_script.judge(frames, captions, bounds) is None
    assert demo_script.verdict_json(None) is None
    (reason,) = demo_script.unknown_prompts(captions)
    assert "a dog runs" in reason
