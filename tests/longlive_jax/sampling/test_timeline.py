"""Chunks of a script: prompts, cuts, offsets, and what a batch of unequal videos looks like."""

import numpy as np
import pytest

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.sampling.script import Shot, ShotScript
from longlive_jax.sampling.timeline import plan
from longlive_jax.spec import UserError

SCRIPT = ShotScript(
    (Shot("a", chunks=2), Shot("b", chunks=2), Shot("c", chunks=1, cut=False), Shot("d", chunks=1))
)


def test_a_cut_is_not_a_prompt_change():
    laid = plan(SCRIPT, chunk_frames=8)
    assert laid.prompts == (("a", "a", CUT_PREFIX + "b", "b", "c", CUT_PREFIX + "d"),)
    np.testing.assert_array_equal(laid.cuts, [[0, 0, 1, 0, 0, 1]])
    np.testing.assert_array_equal(laid.shots, [[0, 0, 1, 1, 1, 2]])
    np.testing.assert_array_equal(laid.offsets(8), [[0, 0, 8, 8, 8, 16]])
    prompts, index = laid.distinct()
    assert prompts == ("a", CUT_PREFIX + "b", "b", "c", CUT_PREFIX + "d")
    np.testing.assert_array_equal(index, [[0, 0, 1, 2, 3, 4]])


def test_the_prefix_is_written_once_and_only_at_the_cut():
    laid = plan(ShotScript((Shot("a", chunks=1), Shot(CUT_PREFIX + "b", chunks=2))), chunk_frames=8)
    assert laid.prompts == (("a", CUT_PREFIX + "b", "b"),)


def test_frames_of_the_first_and_later_chunks():
    laid = plan(SCRIPT, chunk_frames=8)
    assert [laid.frames(k) for k in (0, 1, 2, 6)] == [0, 29, 61, 189]
    assert laid.cut_frames(0) == [61, 157]


@pytest.mark.parametrize(
    ("seconds", "chunks", "said"),
    [(1 / 3, 1, False), (4, 12, False), (4.01, 13, True), (0.01, 1, True), (2 / 3, 2, False)],
)
def test_seconds_round_up_and_say_so(seconds, chunks, said):
    laid = plan(
        ShotScript.of("a", seconds=seconds), chunk_frames=2
    )  # 8 frames, a third of a second
    assert laid.lengths.tolist() == [chunks]
    assert bool(laid.notes) == said
    if said:
        assert f"{seconds:g} s rounded up" in laid.notes[0] and f"{chunks} chunks" in laid.notes[0]


def test_shorter_videos_are_padded_without_cuts():
    short = ShotScript((Shot("x", chunks=1), Shot("y", chunks=1)), name="short")
    laid = plan([SCRIPT, short], chunk_frames=8)
    assert laid.lengths.tolist() == [6, 2] and laid.chunks == 6
    assert laid.prompts[1] == ("x", CUT_PREFIX + "y", "y", "y", "y", "y")
    np.testing.assert_array_equal(laid.cuts[1], [0, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(laid.shots[1], [0, 1, 1, 1, 1, 1])
    assert laid.cut_frames(1) == [29]


def test_bad_plans():
    with pytest.raises(UserError, match="no script"):
        plan([], chunk_frames=8)
    with pytest.raises(ValueError, match="positive"):
        plan(SCRIPT, chunk_frames=0)
