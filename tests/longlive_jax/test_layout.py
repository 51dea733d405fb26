"""Token layouts against the reference's masks and attention traces."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.layout import grid, shot_sinks, teacher_forcing, windowed, windows
from pallas_kernels.tokens import visible


def attended(cuts, chunks, **settings):
    """The chunks that each chunk attends to, including itself."""
    is_cut = np.isin(np.arange(chunks), cuts)
    tokens = windowed(grid(chunks, 1, 1, chunk_frames=1), is_cut, **settings)
    return [np.flatnonzero(row).tolist() for row in np.asarray(visible(tokens, tokens))]


def rows(text):
    return [[int(c) for c in row.split()] for row in text.split("|")]


TRACES = {
    (): "0 | 0 1 | 0 1 2 | 0 1 2 3 | 0 2 3 4 | 0 3 4 5 | 0 4 5 6 | 0 5 6 7",
    (5,): "0 | 0 1 | 0 1 2 | 0 1 2 3 | 0 2 3 4 | 0 3 4 5 | 0 4 5 6 | 0 5 6 7 | 0 5 7 8 | 0 5 8 9",
    (2, 6): "0 | 0 1 | 0 1 2 | 0 1 2 3 | 0 2 3 4 | 0 2 4 5 | 0 2 5 6 | 0 5 6 7 | 0 6 7 8 | 0 6 8 9",
    (4, 5): "0 | 0 1 | 0 1 2 | 0 1 2 3 | 0 2 3 4 | 0 3 4 5 | 0 4 5 6 | 0 5 6 7 | 0 5 7 8",
}


@pytest.mark.parametrize("cuts", TRACES)
def test_windows_with_sinks_equal_the_reference(cuts):
    want = rows(TRACES[cuts])
    assert attended(cuts, len(want), window=4, global_sinks=1) == want


def test_without_sinks_the_window_slides():
    want = rows("0 | 0 1 | 0 1 2 | 1 2 3 | 2 3 4")
    assert attended((2,), 5, window=3, global_sinks=0, shot_sink=False) == want


def test_the_shot_sink_is_the_last_earlier_cut():
    cuts = np.array([[0, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]], bool)
    want = [[-1, 0, 0, 2, 2, 4], [-1, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(shot_sinks(cuts), want)
    np.testing.assert_array_equal(jax.jit(shot_sinks)(cuts), want)


def test_teacher_forcing_equals_the_reference_masks(goldens):
    with np.load(goldens / "teacher_forcing_masks.npz") as z:
        cases = json.loads(bytes(z["__meta__"]))["cases"]
        for i, case in enumerate(cases):
            chunk = case["num_frame_per_block"]
            tokens = teacher_forcing(
                case["num_frames"], 1, case["frame_seqlen"], chunk_frames=chunk
            )
            np.testing.assert_array_equal(visible(tokens, tokens), z[f"logical_{i}"])


def test_grid_varies_columns_fastest_and_shifts_time_only():
    tokens = grid(2, 2, 3, chunk_frames=2, start=4)
    assert tokens.pos[:4].tolist() == [[4, 0, 0], [4, 0, 1], [4, 0, 2], [4, 1, 0]]
    assert tokens.chunk_index.tolist() == [2] * 12 and tokens.uniform_mask
    offset = grid(2, 1, 1, chunk_frames=1, shot_rope_offset=jnp.array([[0.0, 0.5], [8.0, 8.0]]))
    assert offset.pos[..., 0].tolist() == [[0, 1.5], [8, 9]]
    assert offset.chunk_index.tolist() == [[0, 1], [0, 1]]
    traced = jax.jit(lambda start: grid(2, 1, 1, chunk_frames=2, start=start))(jnp.int32(6))
    assert traced.pos[:, 0].tolist() == [6, 7] and traced.chunk_index.tolist() == [3, 3]


def test_invalid_layouts_are_errors():
    with pytest.raises(ValueError, match="begin at a multiple"):
        grid(2, 1, 1, chunk_frames=2, start=3)
    with pytest.raises(ValueError, match="not a multiple of chunk_frames"):
        teacher_forcing(5, 1, 1, chunk_frames=2)
    with pytest.raises(ValueError, match=r"window must be >= 3 .*, got 2"):
        windows(np.zeros(4, bool), window=2, global_sinks=1)
