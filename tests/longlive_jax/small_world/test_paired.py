"""Outcomes of shots by video, and differences of rates between cases on the same videos."""

import json

import numpy as np
import pytest

from longlive_jax import small_world as sw
from longlive_jax.small_world import paired
from longlive_jax.small_world.judge import judge_video
from longlive_jax.small_world.metrics import summary
from longlive_jax.spec import UserError


def text(videos):
    """Outcomes of videos, given as sequences of booleans."""
    return " ".join("".join("01"[int(x)] for x in video) or "-" for video in videos)


def test_outcomes_have_the_rates_of_the_summary():
    rng = np.random.default_rng(0)
    specs = [sw.sample_spec(rng, chunks=6, shot_chunks=(2, 6)) for _ in range(3)]
    verdicts = [judge_video(sw.render(s), s.captions, sw.frame_bounds(s)) for s in specs]
    gray, bounds = sw.render(specs[0]) * 0, sw.frame_bounds(specs[0])
    verdicts.append(judge_video(gray, specs[0].captions, bounds))
    outcomes, rates = paired.outcomes(verdicts), summary(verdicts)
    assert json.loads(json.dumps(outcomes)) == outcomes
    for name, words in outcomes.items():
        assert len(words.split()) == len(verdicts)
        assert words.count("1") / max(1, words.count("1") + words.count("0")) == pytest.approx(
            rates[name]["rate"] or 0
        )


def test_a_difference_is_that_of_the_pooled_rates():
    got = paired.paired_difference("11 101 1 0", "10 001 1 1")
    assert got is not None
    assert got.estimate == pytest.approx(5 / 7 - 4 / 7) and (got.n, got.videos) == (7, 4)
    assert got.low <= got.estimate <= got.high


def test_equal_cases_differ_by_exactly_nothing():
    got = paired.paired_difference("110 0 1", "110 0 1")
    assert got is not None and (got.estimate, got.low, got.high) == (0, 0, 0)


def test_bounds_are_the_same_every_time_and_mirror_each_other():
    rng = np.random.default_rng(1)
    better, worse = (text(rng.random((50, 4)) < rate) for rate in (0.9, 0.8))
    forth, back = (paired.paired_difference(*c) for c in ((better, worse), (worse, better)))
    assert forth is not None and back is not None
    assert forth == paired.paired_difference(better, worse)
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low))


def test_bounds_cover_the_true_difference_as_often_as_they_say():
    """Videos with good and bad luck, so that shots of a video succeed together."""
    rng, trials = np.random.default_rng(2), 400
    missed = 0
    for _ in range(trials):
        luck = rng.normal(0, 0.15, (150, 1))
        rates = [np.clip(rate + luck + rng.normal(0, 0.1, (150, 1)), 0, 1) for rate in (0.6, 0.5)]
        cases = [text(rng.random((150, 4)) < rate) for rate in rates]
        difference = paired.paired_difference(*cases)
        assert difference is not None
        missed += difference.low > 0.1
    assert missed / trials == pytest.approx(0.05, abs=0.03)


def test_shots_of_a_video_are_not_independent():
    """Ten copies of every shot in its video make the bounds no narrower."""
    rng = np.random.default_rng(3)
    cases = [rng.random((60, 1)) < rate for rate in (0.8, 0.7)]
    single = paired.paired_difference(*map(text, cases))
    copies = paired.paired_difference(*(text(case.repeat(10, 1)) for case in cases))
    assert single is not None and copies is not None
    assert (copies.low, copies.high) == pytest.approx((single.low, single.high))


def test_videos_without_cuts_have_no_outcomes():
    assert paired.paired_difference("- -", "- -") is None
    got = paired.paired_difference("1 -", "0 -")
    assert got is not None and got.n == 1


def test_other_videos_cannot_be_paired():
    with pytest.raises(UserError, match="cannot pair 2 videos of 3 shots with 1 of 2"):
        paired.paired_difference("11 0", "10")
