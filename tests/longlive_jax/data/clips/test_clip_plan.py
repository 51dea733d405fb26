"""Joining rules, tested on the lengths of shots alone."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.data.clips.clip_plan import (
    FPS,
    JoinSpec,
    Piece,
    clip_starts,
    count_chunks,
    plan_clip,
    plan_clips,
    raw_frame_slice,
)
from longlive_jax.data.clips.dataset import Unusable


def pieces(lengths, **rules):
    return [
        (p.shot, p.start, p.frames, p.cut) for p in plan_clip(lengths, JoinSpec(**rules)).pieces
    ]


def test_first_chunk_has_29_frames_and_later_chunks_32():
    assert pieces([125], chunks=4) == [
        (0, 0, 29, False), (0, 29, 32, False), (0, 61, 32, False), (0, 93, 32, False)
    ]  # fmt: skip
    spec = JoinSpec(chunks=12)
    assert spec.latents == 96 and spec.frames == 381 == sum(map(spec.num_raw_frames, range(12)))
    assert [JoinSpec(chunk_frames=2).num_raw_frames(i) for i in range(3)] == [5, 8, 8]


def test_a_chunk_never_mixes_shots():
    """The rest of a shot is dropped, and so is a shot too short for a chunk."""
    assert pieces([92, 31, 64], chunks=4) == [
        (0, 0, 29, False), (0, 29, 32, False), (2, 0, 32, True), (2, 32, 32, False)
    ]  # fmt: skip
    assert pieces([28, 29], chunks=1) == [(1, 0, 29, False)]


def test_virtual_cuts_skip_a_second():
    rules = {"chunks": 4, "max_chunks_per_shot": 2}
    assert pieces([29 + 32 + FPS + 64], **rules) == [
        (0, 0, 29, False), (0, 29, 32, False), (0, 61 + FPS, 32, True), (0, 93 + FPS, 32, False)
    ]  # fmt: skip
    # With one frame less, the fourth chunk is in the next shot: a real cut.
    clip = plan_clip([29 + 32 + FPS + 63, 32], JoinSpec(**rules))
    assert [(p.shot, p.cut) for p in clip.pieces] == [
        (0, False), (0, False), (0, True), (1, True)
    ]  # fmt: skip
    assert clip.shot.tolist() == [0, 0, 1, 2]


def test_prompts_have_the_prefix_after_a_cut():
    clip = plan_clip([61, 64], JoinSpec(chunks=4))
    assert clip.prompts(["a", "b"]) == ("a", "a", CUT_PREFIX + "b", "b")
    assert clip.cut.tolist() == [False, False, True, False]
    assert clip.shot.tolist() == [0, 0, 1, 1]
    bare = plan_clip([61, 64], JoinSpec(chunks=4, cut_prefix=""))
    assert bare.prompts(["a", "b"]) == ("a", "a", "b", "b")
    assert bare.cut.tolist() == clip.cut.tolist()


def test_error_for_short_shots_without_padding_states_their_lengths():
    with pytest.raises(Unusable, match=r"fills 2 of 3 chunks .* shots of 40, 50 frames"):
        plan_clip([40, 50], JoinSpec(chunks=3))


def test_padding_repeats_the_last_frame_and_is_masked():
    spec = JoinSpec(chunks=4, chunk_frames=2, pad=True)
    clip = plan_clip([5 + 7], spec)
    assert clip.mask.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]  # 7 frames fill one latent
    assert [at for _, at in clip.frames()] == [*range(12), *[11] * (spec.frames - 12)]
    assert clip.prompts(["a"]) == ("a",) * 4 and not clip.cut.any()
    # After a cut, padding has the last caption without the prefix.
    clip = plan_clip([5, 8], spec)
    assert clip.prompts(["a", "b"]) == ("a", CUT_PREFIX + "b", "b", "b")
    assert clip.shot.tolist() == [0, 1, 1, 1] and clip.mask.tolist() == [1] * 4 + [0] * 4
    assert clip.frames()[-1] == (1, 7)


def test_padding_of_samples_without_a_complete_chunk():
    spec = JoinSpec(chunks=2, chunk_frames=2, pad=True)
    clip = plan_clip([2, 4], spec)  # the longer one
    assert clip.pieces[0] == Piece(1, 0, 4, False) and clip.mask.tolist() == [1, 0, 0, 0]
    assert clip.frames()[3:6] == [(1, 3)] * 3
    assert plan_clip([1], spec).mask.tolist() == [1, 0, 0, 0]
    with pytest.raises(Unusable, match="min_latents"):
        plan_clip([4], JoinSpec(chunks=2, chunk_frames=2, pad=True, min_latents=2))


def test_padding_does_not_continue_after_a_virtual_cut():
    clip = plan_clip(
        [5 + 8 + 7], JoinSpec(chunks=3, chunk_frames=2, pad=True, max_chunks_per_shot=2)
    )
    assert clip.pieces[-1] == Piece(0, 12, 0, False)
    assert clip.mask.tolist() == [1] * 4 + [0, 0]


def test_single_shot_clips():
    rules = {"chunks": 2, "single_shot": True}
    assert pieces([60, 61, 90], **rules) == [(1, 0, 29, False), (1, 29, 32, False)]
    assert {shot for shot, _ in clip_starts([60, 61, 90], JoinSpec(**rules))} == {1, 2}
    with pytest.raises(Unusable):
        plan_clip([60, 60], JoinSpec(**rules))
    padded = plan_clip([20, 30], JoinSpec(**rules, pad=True))
    assert padded.pieces[0] == Piece(1, 0, 29, False)
    clips = plan_clips([61, 10, 130], JoinSpec(**rules))
    assert [clip.pieces[0].shot for clip in clips] == [0, 2, 2]


def test_clips_of_a_sample_are_consecutive():
    spec = JoinSpec(chunks=2, chunk_frames=2)
    clips = plan_clips([30, 20], spec)
    assert [clip.pieces[0] for clip in clips] == [
        Piece(0, 0, 5, False), Piece(0, 13, 5, False), Piece(1, 0, 5, False)
    ]  # fmt: skip
    assert clips[1].pieces[1] == Piece(0, 18, 8, False)
    assert len(plan_clips([30, 20], spec, limit=2)) == 2
    assert len(plan_clips([9], JoinSpec(chunks=2, chunk_frames=2, pad=True))) == 1


def test_count_chunks_is_that_of_the_longest_clip():
    assert count_chunks([125], JoinSpec(chunks=1)) == 4
    assert count_chunks([92, 31, 64], JoinSpec(chunks=1)) == 4
    assert count_chunks([92, 31, 64], JoinSpec(chunks=1, single_shot=True)) == 2
    assert count_chunks([10], JoinSpec(chunks=1)) == 0


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_raw_frames_of_all_shards_cover_the_clip(shards):
    spec = JoinSpec(chunks=4, chunk_frames=2)
    size = spec.latents // shards
    slices = [raw_frame_slice(i * size, (i + 1) * size) for i in range(shards)]
    assert [i for part in slices for i in range(spec.frames)[part]] == list(range(spec.frames))
    assert raw_frame_slice(0, 8) == slice(0, 29) and raw_frame_slice(8, 16) == slice(29, 61)


def test_random_clips_begin_at_any_of_the_starts():
    spec, lengths = JoinSpec(chunks=2, chunk_frames=2), [20, 4, 14]
    starts = clip_starts(lengths, spec)
    # From frame 8 on, shot 0 has room for one chunk only, and shot 2 for the other.
    assert starts == [(0, i) for i in range(16)] + [(2, i) for i in range(2)]
    rng = np.random.default_rng(0)
    drawn = {
        (c.pieces[0].shot, c.pieces[0].start)
        for c in (plan_clip(lengths, spec, rng) for _ in range(400))
    }
    assert drawn == set(starts)
    assert plan_clip(lengths, spec, np.random.default_rng(1)) == plan_clip(
        lengths, spec, np.random.default_rng(1)
    )
    assert len(clip_starts([100_000], spec)) <= 100
    short = JoinSpec(chunks=9, chunk_frames=2, pad=True)
    assert plan_clip(lengths, short, rng) == plan_clip(lengths, short)


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=5),
    chunks=st.integers(1, 5),
    chunk_frames=st.integers(1, 3),
    most=st.integers(0, 3),
    pad=st.booleans(),
    single=st.booleans(),
    seed=st.none() | st.integers(0, 9),
)
def test_every_plan_follows_the_rules(lengths, chunks, chunk_frames, most, pad, single, seed):
    spec = JoinSpec(chunks, chunk_frames, max_chunks_per_shot=most, pad=pad, single_shot=single)
    try:
        clip = plan_clip(lengths, spec, None if seed is None else np.random.default_rng(seed))
    except Unusable:
        assert not pad
        return
    positions, real = clip.frames(), [p for p in clip.pieces if p.frames]
    assert len(clip.pieces) == chunks and len(positions) == spec.frames
    assert positions == sorted(positions)  # never backwards
    assert all(0 <= at < lengths[shot] for shot, at in positions)
    assert not clip.pieces[0].cut and (pad or clip.mask.all())
    for before, after in itertools.pairwise(real):
        is_next = (before.shot, before.start + before.frames) == (after.shot, after.start)
        assert after.cut != is_next
    if single:
        assert len({shot for shot, _ in positions}) == 1
    if most:
        chunks_per_shot = np.bincount(clip.shot[: len(real)])
        assert chunks_per_shot.max() <= most


@pytest.mark.parametrize(
    "rules",
    [
        {"chunks": 0},
        {"chunk_frames": 0},
        {"max_chunks_per_shot": -1},
        {"chunks": 1, "min_latents": 9},
    ],
)
def test_invalid_rules(rules):
    name, value = list(rules.items())[-1]
    with pytest.raises(ValueError, match=rf"^{name} must be .*got {value}$"):
        JoinSpec(**rules)


def test_repr_of_a_piece_never_changes():
    """It is hashed into the dataset digests of existing stores."""
    assert repr(Piece(0, 29, 32, True)) == "Piece(shot=0, start=29, frames=32, cut=True)"
