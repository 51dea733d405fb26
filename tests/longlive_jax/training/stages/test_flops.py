"""FLOPs of a step, against XLA's cost analysis and against the attention mask."""

import jax
import numpy as np
import pytest
from flax import nnx

from longlive_jax.layout import teacher_forcing
from longlive_jax.models.params import abstract, with_params
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.quant.lora import LoRASpec, init_adapter
from longlive_jax.training.stages.flops import (
    clip_update_cost,
    forward_flops,
    visible_chunk_pairs,
    window_update_cost,
)
from pallas_kernels.tokens import visible

CFG = DiTConfig(
    dim=96, ffn_dim=160, freq_dim=16, text_dim=32, text_len=8, heads=2, layers=3,
    in_channels=8, out_channels=8,
)  # fmt: skip


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_visible_pairs_are_those_of_the_mask(chunks):
    tokens = teacher_forcing(2 * chunks, 1, 2, chunk_frames=2)
    mask = np.asarray(visible(tokens, tokens))
    assert visible_chunk_pairs(chunks) * 4**2 == mask.sum()


def test_a_window_limits_the_visible_pairs():
    assert visible_chunk_pairs(5, window=2) == 2 * (1 + 2 + 2 + 2 + 2)


def test_linears_text_and_cross_attention_agree_with_xla():
    """XLA counts up to 6 % more, for everything that is not a matrix product."""
    chunks, rows, columns = 2, 8, 8
    graphdef, params = abstract(lambda: DiT(CFG, rngs=nnx.Rngs(0)))
    tokens = teacher_forcing(2 * chunks, rows, columns, chunk_frames=2)

    def forward(params, latents, level, text):
        dit = with_params(graphdef, params)
        text_kv = dit.text_kv(text)
        attend = lambda q, k, v, *_: q + k + v  # noqa: E731
        return dit(latents, level, text_kv, tokens, attend=attend, noisy_from=2 * chunks)[0]

    shapes = [(1, 4 * chunks, 2 * rows, 2 * columns, 8), (1, 4 * chunks), (1, 2 * chunks, 8, 32)]
    inputs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    # XLA counts the body of the scan over layers only once.
    xla_flops = jax.jit(forward).lower(params, *inputs).cost_analysis()["flops"]
    one_layer = DiTConfig(**{**vars(CFG), "layers": 1})
    flops = forward_flops(one_layer, chunks=chunks, chunk_tokens=2 * rows * columns)
    length = 2 * chunks * 2 * rows * columns
    cross_attention = 4.0 * one_layer.dim * length * one_layer.text_len
    products = flops.linears + flops.text + cross_attention
    assert products < xla_flops < 1.06 * products


def test_an_update_costs_three_forward_passes_per_clip():
    forward = forward_flops(CFG, chunks=3, chunk_tokens=10)
    cost = clip_update_cost(CFG, batch=4, chunks=3, chunk_tokens=10)
    assert cost.tokens == 4 * 2 * 3 * 10 and cost.flops == 3 * 4 * forward.total
    assert sorted(cost.kinds) == ["attention", "linears", "text"]
    assert cost.kinds["text"] == 12 * forward.text
    assert sum(cost.kinds.values()) == pytest.approx(cost.flops)


def test_an_adapter_saves_the_gradients_of_frozen_matrices():
    forward = forward_flops(CFG, chunks=3, chunk_tokens=10)
    shapes = abstract(lambda: DiT(CFG, rngs=nnx.Rngs(0)))[1]
    spec = LoRASpec(rank=4, targets="blocks/ffn/.*")
    adapter = jax.eval_shape(lambda: init_adapter(jax.random.key(0), shapes, spec))
    cost = clip_update_cost(CFG, batch=4, chunks=3, chunk_tokens=10, adapter=adapter)
    assert cost.kinds["linears"] == 4 * 2 * forward.linears
    assert cost.kinds["attention"] == 4 * 3 * forward.attention
    assert cost.kinds["text"] == 4 * forward.text
    branches = 2 * (CFG.dim + CFG.ffn_dim) * 4 * CFG.layers
    assert cost.kinds["adapter"] == 3 * 2.0 * cost.tokens * branches
    assert sum(cost.kinds.values()) == pytest.approx(cost.flops)


def test_full_windows_cost_as_much_as_clips():
    """For two chunks, clean and noisy, but a clip's first chunks attend to one chunk only."""
    clip = clip_update_cost(CFG, batch=4, chunks=2, chunk_tokens=10)
    cost = window_update_cost(CFG, batch=4, context=2, target=2, chunk_tokens=10, window=2)
    assert cost.tokens == clip.tokens
    for kind in ("linears", "text"):
        assert cost.kinds[kind] == clip.kinds[kind]
    padding = 3 * 4 * 4.0 * CFG.layers * CFG.dim * 2 * 10**2  # in the windows of the first chunks
    assert cost.kinds["attention"] == clip.kinds["attention"] + padding
    fewer = window_update_cost(CFG, batch=4, context=3, target=1, chunk_tokens=10, window=2)
    head = 3 * 4 * 2.0 * 4 * CFG.out_channels * 10 * CFG.dim
    assert fewer.tokens == cost.tokens and cost.flops - fewer.flops == head
