"""Clips from real files: joined, read in shards, and rejected with a reason."""

import numpy as np
import pytest

from longlive_jax.data.clips.clip_plan import JoinSpec, plan_clip, raw_frame_slice
from longlive_jax.data.clips.dataset import Unusable, VideoSample, find_samples, usable
from longlive_jax.data.clips.loader import ClipFeed, FeedSpec
from longlive_jax.data.clips.source import VideoClips, read_clip, shot_lengths
from longlive_jax.parallel.halo import halo_windows
from tests.longlive_jax.data.clips.videos import cut_short, numbers, write_sample

SIZE = (32, 64)
JOIN = JoinSpec(chunks=3, chunk_frames=2)
THIRTY = [int(1.25 * i + 0.3125) for i in range(32)]
"""Frames of a 30 fps video that are on screen at 24 fps."""


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Two shots at 30 fps, a long shot, a truncated shot with an intact index, and a short one."""
    root = tmp_path_factory.mktemp("dataset")
    write_sample(root, "a", 15, 40, fps=30)
    write_sample(root, "b", 80)
    write_sample(root, "c", 96, options={"movflags": "faststart"})
    write_sample(root, "d", 9)
    cut_short(root / "video" / "c" / "0.mp4", 0.7)
    return usable(find_samples(root), root)


def test_joined_clip(samples):
    assert shot_lengths(samples[0]) == [12, 32]
    clip = plan_clip(shot_lengths(samples[0]), JOIN)
    assert numbers(read_clip(samples[0], clip, SIZE)) == THIRTY[:5] + THIRTY[:16]
    skipping = plan_clip(
        shot_lengths(samples[1]), JoinSpec(chunks=3, chunk_frames=2, max_chunks_per_shot=2)
    )
    assert numbers(read_clip(samples[1], skipping, SIZE)) == [*range(13), *range(37, 45)]
    padded = plan_clip(shot_lengths(samples[3]), JoinSpec(chunks=3, chunk_frames=2, pad=True))
    assert numbers(read_clip(samples[3], padded, SIZE)) == [*range(9), *[8] * 12]


def test_parts_of_a_clip_for_shards(samples):
    clip = plan_clip(shot_lengths(samples[0]), JOIN)
    video = read_clip(samples[0], clip, SIZE)
    shards = [raw_frame_slice(2 * p, 2 * p + 2) for p in range(3)]
    halos = [slice(w.first, w.last) for w in halo_windows(6, 3, halo=1)]
    for part in shards + halos + [slice(3, 7), slice(20, 21), [0, 3, 4, 5, 9, 20]]:
        np.testing.assert_array_equal(read_clip(samples[0], clip, SIZE, part), video[part])


def test_row(samples):
    row = VideoClips(samples, JOIN, SIZE, anywhere=False).read(0, np.random.default_rng(0))
    assert row["video"].shape == (21, *SIZE, 3) and row["video"].dtype == np.uint8
    assert row["cut"].tolist() == [False, True, False] and row["shot"].tolist() == [0, 1, 1]
    assert row["mask"].tolist() == [1] * 6 and row["dropped"] == ""
    assert row["prompts"].tolist() == [
        "a shot 0", "The scene transitions. a shot 1", "a shot 1"
    ]  # fmt: skip


def test_random_start_depends_on_the_generator_alone(samples):
    source = VideoClips(samples, JOIN, SIZE)
    firsts = [numbers(source.read(1, np.random.default_rng(i))["video"])[0] for i in range(6)]
    assert len(set(firsts)) > 3 and max(firsts) <= 80 - 21
    again = numbers(source.read(1, np.random.default_rng(2))["video"])[0]
    assert again == firsts[2]


def test_reasons_of_unusable_samples(samples):
    source = VideoClips(samples, JOIN, SIZE, anywhere=False)
    rng = np.random.default_rng(0)
    with pytest.raises(Unusable, match=r"0\.mp4: cannot be read past"):
        VideoClips(samples, JoinSpec(chunks=10, chunk_frames=2), SIZE, anywhere=False).read(2, rng)
    with pytest.raises(Unusable, match="too short: fills 1 of 3 chunks"):
        source.read(3, rng)
    with pytest.raises(Unusable, match="no caption"):
        shot_lengths(VideoSample("x", problem="no caption"))
    assert source.name(3) == "d"


def test_damage_in_a_part_marks_the_row(samples):
    """A process that reads the beginning cannot detect it, so no other may take another sample."""
    join = JoinSpec(chunks=10, chunk_frames=2)
    begin, end = (
        VideoClips(samples, join, SIZE, part=part, anywhere=False).read(2, np.random.default_rng(0))
        for part in (range(5), [*range(8), *range(68, 77)])
    )
    assert begin["dropped"] == "" and numbers(begin["video"]) == list(range(5))
    assert end["dropped"].item().startswith("c: 0.mp4: cannot be read past")
    assert not end["video"].any() and end["video"].shape == (17, *SIZE, 3)


def test_feed_of_videos_skips_unusable_samples(samples):
    """Also in worker processes; shapes are constant, and every chunk has a caption."""
    source = VideoClips(samples, JoinSpec(chunks=4, chunk_frames=2), SIZE)
    runs = []
    for workers in (0, 1):
        spec = FeedSpec(batch=2, workers=workers)
        with ClipFeed(source, spec) as feed:
            runs.append([next(feed) for _ in range(4)])
            assert all("d: too short" in r or "c: 0.mp4: " in r for r in feed.skipped)
            assert any("d: too short" in reason for reason in feed.skipped)
    for batch, other in zip(*runs, strict=True):
        assert batch["video"].shape == (2, 29, *SIZE, 3) and batch["prompts"].shape == (2, 4)
        assert all(map(str.strip, batch["prompts"].reshape(-1).tolist()))
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])
