"""Operations of a step, against the compiler's own count and against counting pairs."""

import jax
import numpy as np
import pytest
from flax import nnx

from longlive_jax.layout import teacher_forcing
from longlive_jax.models.params import abstract, with_params
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.training.stages.flops import (
    clip_update_cost,
    forward_flops,
    pairs_seen,
    window_update_cost,
)
from pallas_kernels.tokens import visible

CFG = DiTConfig(
    dim=96, ffn_dim=160, freq_dim=16, text_dim=32, text_len=8, heads=2, layers=3,
    in_channels=8, out_channels=8,
)  # fmt: skip


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_pairs_are_those_of_the_mask(chunks):
    tokens = teacher_forcing(2 * chunks, 1, 2, chunk_frames=2)
    seen = np.asarray(visible(tokens, tokens))
    assert pairs_seen(chunks) * 4**2 == seen.sum()


def test_a_window_bounds_what_is_seen():
    assert pairs_seen(5, window=2) == 2 * (1 + 2 + 2 + 2 + 2)


def test_linears_and_text_are_what_the_compiler_counts():
    """And the attention to texts; all that is no product is a few percent more."""
    chunks, rows, columns = 2, 8, 8
    graphdef, params = abstract(lambda: DiT(CFG, rngs=nnx.Rngs(0)))
    tokens = teacher_forcing(2 * chunks, rows, columns, chunk_frames=2)

    def forward(params, latents, level, text):
        dit = with_params(graphdef, params)
        words = dit.text_kv(text)
        attend = lambda q, k, v, *_: q + k + v  # noqa: E731
        return dit(latents, level, words, tokens, attend=attend, noisy_from=2 * chunks)[0]

    shapes = [(1, 4 * chunks, 2 * rows, 2 * columns, 8), (1, 4 * chunks), (1, 2 * chunks, 8, 32)]
    inputs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    # The layers' scan is counted once.
    num_loss_frames = jax.jit(forward).lower(params, *inputs).cost_analysis()["flops"]
    one = DiTConfig(**{**vars(CFG), "layers": 1})
    found = forward_flops(one, chunks=chunks, chunk_tokens=2 * rows * columns)
    length = 2 * chunks * 2 * rows * columns
    to_text = 4.0 * one.dim * length * one.text_len
    products = found.linears + found.text + to_text
    assert products < num_loss_frames < 1.06 * products


def test_a_step_is_three_forward_passes_of_every_clip():
    forward = forward_flops(CFG, chunks=3, chunk_tokens=10)
    work = clip_update_cost(CFG, batch=4, chunks=3, chunk_tokens=10)
    assert work.tokens == 4 * 2 * 3 * 10 and work.flops == 3 * 4 * forward.total
    assert sorted(work.kinds) == ["attention", "linears", "text"]
    assert work.kinds["text"] == 12 * forward.text
    assert sum(work.kinds.values()) == pytest.approx(work.flops)


def test_episodes_that_see_all_they_have_are_clips():
    """Two chunks of a clip, clean and noisy, in a window of two; but the first chunks see one."""
    clip = clip_update_cost(CFG, batch=4, chunks=2, chunk_tokens=10)
    work = window_update_cost(CFG, batch=4, context=2, target=2, chunk_tokens=10, window=2)
    assert work.tokens == clip.tokens
    for kind in ("linears", "text"):
        assert work.kinds[kind] == clip.kinds[kind]
    unseen = 3 * 4 * 4.0 * CFG.layers * CFG.dim * 2 * 10**2  # of the first chunks' padded windows
    assert work.kinds["attention"] == clip.kinds["attention"] + unseen
    fewer = window_update_cost(CFG, batch=4, context=3, target=1, chunk_tokens=10, window=2)
    head = 3 * 4 * 2.0 * 4 * CFG.out_channels * 10 * CFG.dim
    assert fewer.tokens == work.tokens and work.flops - fewer.flops == head
