"""Attention for fixed tokens: the same results, with tile maps computed outside of the layers."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.layout import grid, teacher_forcing
from longlive_jax.models.wan import DiT, DiTConfig
from pallas_kernels.attention import (
    api,
    attention,
    attention_with_lse,
    fixed_mask,
    make_attention,
)
from pallas_kernels.attention.mosaic import op
from pallas_kernels.attention.mosaic.targets import HOPPER
from pallas_kernels.catalog import catalog
from pallas_kernels.dispatch import Unsupported

LAYERS = 3


def arrays(length, *, width=8, dtype=jnp.float32):
    return [
        jax.random.normal(key, (2, length, 2, width), dtype)
        for key in jax.random.split(jax.random.key(0), 3)
    ]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_fixed_tokens_give_the_results_of_attention(implementation):
    tokens = teacher_forcing(3, 1, 5, chunk_frames=1)
    qkv = arrays(len(tokens))
    want = attention_with_lse(*qkv, tokens, tokens, implementation=implementation)

    @jax.jit
    def as_argument(attend, *qkv):
        return attend(*qkv), attend.with_lse(*qkv)

    for known in (tokens, jax.tree.map(jnp.asarray, tokens)):
        attend = make_attention(known, known, implementation=implementation)
        np.testing.assert_allclose(attend(*qkv, known, known), want[0], rtol=2e-5, atol=2e-5)
        out, both = as_argument(attend, *qkv)
        for got, wanted in zip((out, *both), (want[0], *want), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


def test_lengths_must_match_the_fixed_tokens():
    tokens = grid(2, 1, 5, chunk_frames=1)
    with pytest.raises(ValueError, match="10 query tokens for 12 query rows"):
        make_attention(tokens, tokens)(*arrays(12))


def test_mosaic_without_kernels_is_refused():
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has a GPU")
    tokens = grid(2, 1, 5, chunk_frames=1)
    with pytest.raises(Unsupported, match="this is no NVIDIA GPU"):
        make_attention(tokens, tokens, implementation="mosaic")


@pytest.fixture
def executed(monkeypatch):
    """Counts executions at run time: of tile maps, and of kernels that read them.

    The kernels are replaced by trivial ones of the same signature, which run on any device.
    """
    # 1. Tile maps and kernels that count their executions.
    counts: collections.Counter[str] = collections.Counter()

    def count(name):
        jax.debug.callback(lambda: counts.update([name]))

    def tile_map(*arguments, original=op.tile_map, **options):
        count("tile map")
        return original(*arguments, **options)

    def forward(q, k, v, columns, tiles, size, *, interpret=None):
        count("kernel")
        b, length, heads, _ = q.shape
        return q * tiles.count.max().astype(q.dtype), jnp.zeros((b, heads, length))

    def query_gradient(saved, tiles, size, *, interpret=None):
        count("kernel")
        return saved.grad * tiles.count.max().astype(saved.grad.dtype)

    def key_value_gradient(saved, tiles, size, *, interpret=None):
        count("kernel")
        return (saved.k * tiles.count.max().astype(saved.k.dtype),) * 2

    # 2. A Hopper GPU with these kernels.
    kernels = (forward, query_gradient, key_value_gradient)
    target = dataclasses.replace(HOPPER, **{kernel.__name__: kernel for kernel in kernels})
    record = dataclasses.replace(catalog()["attention_forward_hopper"], target=target)
    monkeypatch.setattr(op, "kernel_of", lambda name: record)
    monkeypatch.setattr(op, "tile_map", tile_map)
    monkeypatch.setattr(op, "platform", lambda: "gpu")
    monkeypatch.setattr(op, "capability", lambda: "9.0")
    return counts


@pytest.mark.parametrize(("dtype", "kernels"), [("bfloat16", 1), ("float32", 0)])
def test_auto_builds_the_mask_once_where_the_kernels_are_proven(
    dtype, kernels, executed, monkeypatch
):
    """Proven kernels that do not support the arguments leave them to another implementation."""
    for module in (api, fixed_mask):
        monkeypatch.setattr(module, "proven", lambda op, q: q.dtype == jnp.bfloat16)
    tokens = grid(2, 1, 5, chunk_frames=1)
    attend = make_attention(tokens, tokens)
    jax.effects_barrier()
    executed.clear()
    jax.block_until_ready(attend(*arrays(len(tokens), width=64, dtype=dtype)))
    jax.effects_barrier()
    assert (executed["kernel"], executed["tile map"]) == (kernels, 0)


@pytest.mark.parametrize("known", [True, False], ids=["concrete", "traced"])
@pytest.mark.parametrize("fixed", [True, False], ids=["fixed mask", "every call"])
def test_tile_maps_are_computed_outside_of_the_scan_over_layers(fixed, known, executed):
    """A step computes no maps if tokens are concrete, and each map once if they are traced."""
    tokens = teacher_forcing(2, 2, 3, chunk_frames=1)
    cfg = DiTConfig(
        dim=64, ffn_dim=8, freq_dim=8, text_dim=4, text_len=2, heads=1, layers=LAYERS,
        in_channels=4, out_channels=4, dtype="bfloat16",
    )  # fmt: skip

    def loss(latents, text, tokens):
        def every_call(*arguments):
            return attention(*arguments, implementation="mosaic")

        attend = make_attention(tokens, tokens, implementation="mosaic") if fixed else every_call
        dit = DiT(cfg, rngs=nnx.Rngs(0))
        level = jnp.full((1, 4), 500.0)
        text_kv = dit.text_kv(text)
        return dit(latents, level, text_kv, tokens, attend=attend, remat="everything")[0].sum()

    inputs = [jnp.ones(shape) for shape in ((1, 4, 4, 6, 4), (1, 1, 2, 4))]
    if known:
        step = jax.jit(jax.grad(lambda *inputs: loss(*inputs, tokens)))
    else:
        inputs.append(jax.tree.map(jnp.asarray, tokens))
        step = jax.jit(jax.grad(loss))
    jax.block_until_ready(step(*inputs))  # traces and compiles
    jax.effects_barrier()
    executed.clear()
    jax.block_until_ready(step(*inputs))
    jax.effects_barrier()
    assert executed["kernel"] >= 2 * LAYERS  # every layer runs kernels, forward and backward
    if known:
        assert executed["tile map"] == 0
    elif fixed:
        assert executed["tile map"] == 3  # one for each kernel
    else:
        assert executed["tile map"] >= 3 * LAYERS
