"""The demo's script and the judge's words, on drawn videos."""

import itertools

import pytest

from longlive_jax.io.pictures import to_uint8
from longlive_jax.small_world import demo_script as story
from longlive_jax.small_world import frame_bounds, held_out, parse_caption, render, sample_spec


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_built_in_story_is_held_out_and_brings_a_subject_back(seed):
    script = story.held_out_story(seed)
    scenes = [parse_caption(shot.prompt) for shot in script.shots]
    assert len(scenes) >= 3 and sum(shot.chunks for shot in script.shots) == story.CHUNKS
    assert all(held_out(s.shape, s.colour, s.background, s.motion) for s in scenes)
    subjects = [(s.shape, s.colour) for s in scenes]
    runs = [key for key, _ in itertools.groupby(subjects)]
    assert runs.count(subjects[0]) > 1
    assert story.held_out_story(seed) == script


def test_own_prompts_fill_at_least_the_same_time():
    script = story.story_of(["a", "b", "c"], 3)
    assert [shot.prompt for shot in script.shots] == ["a", "b", "c"]
    assert sum(shot.chunks for shot in script.shots) >= story.CHUNKS


def drawn(seed=0, **changes):
    import numpy as np

    spec = sample_spec(
        np.random.default_rng(seed), chunks=9, shots=3, shot_chunks=(3, 3), cast=2, **changes
    )
    return to_uint8(render(spec)), list(spec.captions), frame_bounds(spec)


def test_words_about_a_true_video():
    verdict = story.judge(*drawn())
    words = list(story.in_words(verdict))
    assert words[0].startswith("shot 1: ") and words[0].endswith(": right")
    assert "all 2 cuts fall on their frames" in words
    assert words[-1] == "3 of 3 shots show everything their captions say"


def test_words_name_what_is_wrong():
    frames, captions, bounds = drawn()
    shape = parse_caption(captions[0]).shape
    other = "circle" if shape != "circle" else "square"
    captions[0] = captions[0].replace(shape, other)
    frames[bounds[1][0] : bounds[1][0] + 8] = frames[0]  # the first cut comes late
    words = "\n".join(story.in_words(story.judge(frames, captions, bounds)))
    assert f"shape is {shape} instead of {other}" in words
    assert "it belongs on frame" in words


def test_prompts_of_another_world_are_not_judged():
    frames, captions, bounds = drawn()
    captions[1] = "a dog runs"
    assert story.judge(frames, captions, bounds) is None
    assert story.as_json(None) is None
    (reason,) = story.strangers(captions)
    assert "a dog runs" in reason
