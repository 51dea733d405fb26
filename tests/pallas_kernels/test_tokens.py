import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tokens import EMPTY, concat, make, visible, visible_keys


def tokens(text, **columns):
    """One token per word: the chunk index, followed by 'n' if noisy; '-' is an empty slot."""
    words = text.split()
    chunk = np.array([EMPTY if word == "-" else int(word.rstrip("n")) for word in words])
    noisy = np.array([word.endswith("n") for word in words])
    return make(np.zeros((len(words), 3), np.int32), chunk, noisy, **columns)


def table(text):
    return np.array([[c == "x" for c in row.strip()] for row in text.strip().splitlines()])


CASES = {
    "bidirectional": ("0 0 0", {}, "0 0 0", "xxx\nxxx\nxxx"),
    "block causal": ("0 0 1 2", {}, "0 0 1 2", "xx..\nxx..\nxxx.\nxxxx"),
    "teacher forcing": (
        "0 1 2 0n 1n 2n",
        {},
        "0 1 2 0n 1n 2n",
        "x.....\nxx....\nxxx...\n...x..\nx...x.\nxx...x",
    ),
    "denoising against a cache": ("4n 4n", {}, "4n 4n 0 2 3 -", "xxxxx.\nxxxxx."),
    "writing context to the cache": ("4 4", {}, "4 4 0 2 3 -", "xxxxx.\nxxxxx."),
    "noisy tokens of other chunks are masked": ("1 1n", {}, "0n 1n 2n", "...\n.x."),
    "window": ("5", {"window_start": 3}, "0 1 2 3 4 5 6", "...xxx."),
    "window and shot sink": ("5", {"window_start": 4, "sink": 2}, "0 1 2 3 4 5 6", "..x.xx."),
    "window, shot and global sinks": (
        "5n",
        {"window_start": 4, "sink": 2, "global_sinks": 1},
        "0 1 2 3 4 5 5n",
        "x.x.x.x",
    ),
    "padding queries are fully masked": ("- -", {}, "- 0 0n", "...\n..."),
}


@pytest.mark.parametrize("case", CASES)
def test_visible_as_a_table(case):
    queries, columns, keys, want = CASES[case]
    q, k = tokens(queries, **columns), tokens(keys)
    np.testing.assert_array_equal(visible(q, k), table(want))
    traced = jax.jit(visible)(q, k)
    np.testing.assert_array_equal(traced, table(want))


def test_queries_with_a_uniform_mask_need_one_row():
    q = tokens("3n 3n", window_start=2, global_sinks=1, uniform_mask=True)
    k = tokens("3n 3n 0 1 2 -")
    np.testing.assert_array_equal(visible_keys(q, k), visible(q, k)[0])
    with pytest.raises(ValueError, match="differ"):
        visible_keys(q.replace(uniform_mask=False), k)


def test_columns_stay_numpy_unless_an_argument_is_traced():
    own, slots = tokens("1n 1n", uniform_mask=True), tokens("0 0")
    assert isinstance(visible(own, concat(own, slots)), np.ndarray)
    batched = make(jnp.zeros((2, 2, 3), jnp.int32), jnp.array([[0, 0], [0, EMPTY]]), False)
    both = concat(own, batched)
    assert (
        both.chunk_index.shape == (2, 4) and both.pos.shape == (2, 4, 3) and not both.uniform_mask
    )
    np.testing.assert_array_equal(visible(own, both), [table("xxxx\nxxxx"), table("xxx.\nxxx.")])
