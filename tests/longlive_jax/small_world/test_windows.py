"""Training windows: their columns, and their attention compared with the sampler's windows."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.layout import windows
from longlive_jax.small_world.windows import (
    EncodedVideos,
    WindowBatches,
    WindowSpec,
    chunk_prompts,
    prompt_table,
)
from longlive_jax.small_world.world import (
    CHUNK_LATENTS,
    ShotSpec,
    Subject,
    VideoSpec,
    sample_spec,
)
from pallas_kernels.tokens import EMPTY, make, visible

SPEC = WindowSpec(batch=48, targets=2, window=4, global_sinks=1, shot_rope_offset=8, far=0)


def example_video():
    """Three shots of 3, 4 and 5 chunks; the last returns to the first subject."""
    circle = Subject("circle", "red", 12.0, "white")
    cross = Subject("cross", "blue", 10.0, "black")
    return VideoSpec(
        (
            ShotSpec(circle, "black", "left", 30.0, 30.0, 3),
            ShotSpec(cross, "black", "left", 60.0, 30.0, 4),
            ShotSpec(circle, "white", "up", 30.0, 30.0, 5),
        )
    )


def encoded(*specs):
    """Videos whose latents encode their origin: 100 times the video index plus the frame index."""
    prompt, shot = (np.stack(x) for x in zip(*map(chunk_prompts, specs), strict=True))
    number = 100 * np.arange(len(specs))[:, None] + np.arange(shot.shape[1] * CHUNK_LATENTS)
    ones = np.ones((1, 1, 2, 2, 1), np.float16)
    return EncodedVideos(number[:, :, None, None, None].astype(np.float16) * ones, prompt, shot)


def example_windows(*specs, spec=SPEC, seed=0):
    """The windows of the first batch, one dictionary each."""
    batch = WindowBatches(encoded(*specs), spec, 4, seed)[0]
    return [{k: v[i] for k, v in batch.items()} for i in range(spec.batch)]


def starting_at(first, candidates):
    """The first window whose targets start at chunk `first`."""
    return next(w for w in candidates if w["chunk_index"][-SPEC.targets] == first)


def test_prompts_of_chunks():
    spec = example_video()
    row, shot = chunk_prompts(spec)
    a, b, c = spec.captions
    assert shot.tolist() == 3 * [0] + 4 * [1] + 5 * [2]
    assert [prompt_table()[i] for i in row] == (
        [a, a, a, CUT_PREFIX + b, b, b, b, CUT_PREFIX + c, c, c, c, c]
    )
    assert prompt_table()[-1] == ""


def test_columns_of_a_window():
    got = starting_at(8, example_windows(example_video()))
    row, _ = chunk_prompts(example_video())
    # Global sink, shot sink, recent chunks (7 is already the shot sink), then the targets.
    assert got["chunk_index"].tolist() == [0, 7, 5, 6, EMPTY, 8, 0, 8, 9]
    chunks = np.maximum(got["chunk_index"], 0)
    assert got["window_start"].tolist() == [0, 6, 3, 5, 0, 6, 0, 6, 7]
    assert got["sink"].tolist() == [EMPTY, 3, 3, 3, EMPTY, 7, EMPTY, 7, 7]
    assert got["start"].tolist() == [0, 44, 28, 32, 0, 48, 0, 48, 52]
    np.testing.assert_array_equal(got["prompt"], row[chunks])
    frames = (chunks[:, None] * CHUNK_LATENTS + np.arange(CHUNK_LATENTS)).reshape(-1)
    np.testing.assert_array_equal(got["context"][:, 0, 0, 0], frames[: 6 * CHUNK_LATENTS])
    np.testing.assert_array_equal(got["target"][:, 0, 0, 0], frames[6 * CHUNK_LATENTS :])
    assert got["context"].dtype == np.float32 and got["mask"].tolist() == [1.0] * 12


def test_chunks_before_the_video_are_empty():
    got = starting_at(1, example_windows(example_video()))
    assert got["chunk_index"].tolist() == [0, EMPTY, EMPTY, EMPTY, EMPTY, 1, 0, 1, 2]


@pytest.mark.parametrize(("targets", "window"), [(2, 4), (5, 3)])
def test_targets_attend_to_what_the_sampler_attends_to(targets, window):
    """The context has every chunk that they attend to exactly once, for any cuts."""
    rng = np.random.default_rng(1)
    specs = [sample_spec(rng, chunks=20, shot_chunks=(1, 7)) for _ in range(4)]
    expected = [sampler_sets(video, window) for video in specs]
    spec = WindowSpec(batch=24, targets=targets, window=window, global_sinks=1, far=0)
    context = targets + window
    for row in example_windows(*specs, spec=spec):
        chunk = row["chunk_index"]
        noisy = np.arange(len(chunk)) >= context
        pos = np.zeros((len(chunk), 3), np.int32)
        tokens = make(
            pos,
            chunk,
            noisy,
            window_start=row["window_start"],
            sink=row["sink"],
            global_sinks=spec.global_sinks,
        )
        mask = visible(tokens, tokens)[context:]
        np.testing.assert_array_equal(mask[:, context:], np.eye(targets + 1, dtype=bool))
        past = [sorted(chunk[:context][attended]) for attended in mask[:, :context]]
        video = int(row["target"].flat[0]) // 100
        assert past == [expected[video][now] for now in chunk[context:]]


def sampler_sets(spec, window):
    """The past chunks that the sampler attends to, for every chunk of a video."""
    cuts = np.diff(chunk_prompts(spec)[1], prepend=0) > 0
    columns = windows(jnp.asarray(cuts), window=window, global_sinks=1)
    window_start, sink = (np.asarray(x).tolist() for x in columns)
    return [
        [c for c in range(now) if c >= window_start[now] or c == sink[now] or c < 1]
        for now in range(len(cuts))
    ]


def test_positions_have_random_gaps_and_stay_ordered():
    far = example_windows(example_video(), spec=WindowSpec(batch=48, targets=2, far=320))
    gaps = set()
    for row in far:
        chunk, start = row["chunk_index"], row["start"]
        near = np.maximum(chunk, 0) * CHUNK_LATENTS
        near += SPEC.shot_rope_offset * chunk_prompts(example_video())[1][np.maximum(chunk, 0)]
        shift = start - near
        late = (chunk >= chunk[-2] - SPEC.window + 1) & (chunk > 0)
        assert len(set(shift[late])) == 1  # recent chunks and targets move together
        order = np.argsort(chunk[chunk >= 0], kind="stable")
        assert (np.diff(start[chunk >= 0][order]) >= 0).all()
        gaps.add(int(shift[-1] - shift[0]))
    assert 0 in gaps and max(gaps) > 100


def test_a_batch_is_a_function_of_seed_and_step():
    videos = encoded(example_video())
    first, second = (WindowBatches(videos, SPEC, 4, 0) for _ in range(2))
    assert len(first) == 4
    chex.assert_trees_all_equal(first[2], second[2])
    for different in (first[3], WindowBatches(videos, SPEC, 4, 1)[2]):
        assert not np.array_equal(first[2]["chunk_index"], different["chunk_index"])


def test_more_than_one_global_sink_is_rejected():
    with pytest.raises(ValueError, match="must be 0 or 1, got 2"):
        WindowSpec(global_sinks=2)


def test_a_window_that_is_too_small_is_rejected():
    with pytest.raises(ValueError, match=r"window must be >= 3 .*, got 2"):
        example_windows(example_video(), spec=WindowSpec(window=2))
