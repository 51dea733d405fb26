"""Chunks of a script: prompts, cuts, offsets, and the padding of unequal videos."""

import numpy as np
import pytest

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.sampling.script import Shot, ShotScript
from longlive_jax.sampling.timeline import make_timeline
from longlive_jax.spec import UserError

SCRIPT = ShotScript(
    (Shot("a", chunks=2), Shot("b", chunks=2), Shot("c", chunks=1, cut=False), Shot("d", chunks=1))
)


def test_a_cut_is_not_a_prompt_change():
    timeline = make_timeline(SCRIPT, chunk_frames=8)
    assert timeline.prompts == (("a", "a", CUT_PREFIX + "b", "b", "c", CUT_PREFIX + "d"),)
    np.testing.assert_array_equal(timeline.cuts, [[0, 0, 1, 0, 0, 1]])
    np.testing.assert_array_equal(timeline.shots, [[0, 0, 1, 1, 1, 2]])
    np.testing.assert_array_equal(timeline.shot_rope_offsets(8), [[0, 0, 8, 8, 8, 16]])
    prompts, index = timeline.distinct_prompts()
    assert prompts == ("a", CUT_PREFIX + "b", "b", "c", CUT_PREFIX + "d")
    np.testing.assert_array_equal(index, [[0, 0, 1, 2, 3, 4]])


def test_the_prefix_is_written_once_and_only_at_the_cut():
    timeline = make_timeline(
        ShotScript((Shot("a", chunks=1), Shot(CUT_PREFIX + "b", chunks=2))), chunk_frames=8
    )
    assert timeline.prompts == (("a", CUT_PREFIX + "b", "b"),)


def test_frames_of_the_first_and_later_chunks():
    timeline = make_timeline(SCRIPT, chunk_frames=8)
    assert [timeline.num_frames(k) for k in (0, 1, 2, 6)] == [0, 29, 61, 189]
    assert timeline.cut_frames(0) == [61, 157]


@pytest.mark.parametrize(
    ("seconds", "chunks", "is_noted"),
    [(1 / 3, 1, False), (4, 12, False), (4.01, 13, True), (0.01, 1, True), (2 / 3, 2, False)],
)
def test_seconds_round_up_with_a_note(seconds, chunks, is_noted):
    script = ShotScript.of("a", seconds=seconds)
    timeline = make_timeline(script, chunk_frames=2)  # chunks of 8 frames: a third of a second
    assert timeline.lengths.tolist() == [chunks]
    assert bool(timeline.notes) == is_noted
    if is_noted:
        assert (
            f"{seconds:g} s rounded up" in timeline.notes[0]
            and f"{chunks} chunks" in timeline.notes[0]
        )


def test_shorter_videos_are_padded_without_cuts():
    short = ShotScript((Shot("x", chunks=1), Shot("y", chunks=1)), name="short")
    timeline = make_timeline([SCRIPT, short], chunk_frames=8)
    assert timeline.lengths.tolist() == [6, 2] and timeline.num_chunks == 6
    assert timeline.prompts[1] == ("x", CUT_PREFIX + "y", "y", "y", "y", "y")
    np.testing.assert_array_equal(timeline.cuts[1], [0, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(timeline.shots[1], [0, 1, 1, 1, 1, 1])
    assert timeline.cut_frames(1) == [29]


def test_bad_timelines():
    with pytest.raises(UserError, match="no script"):
        make_timeline([], chunk_frames=8)
    with pytest.raises(
        ValueError, match="chunk_frames, temporal_stride and fps must be positive, got 0"
    ):
        make_timeline(SCRIPT, chunk_frames=0)
