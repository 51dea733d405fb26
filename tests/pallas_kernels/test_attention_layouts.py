"""Layouts made once: the same numbers, and nothing made again in the scan over layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.layout import grid, teacher_forcing
from longlive_jax.models.wan import DiT, DiTConfig
from pallas_kernels.attention import attention, attention_with_lse, lay_out
from pallas_kernels.attention.mosaic import op
from pallas_kernels.dispatch import Unsupported
from tests.pallas_kernels.programs import equations, names

MAP_MAKING = {"_tiles", "_collect", "_needed"}
"""Jitted parts of `tilemap`."""


def arrays(length, *, width=8, dtype=jnp.float32):
    return [
        jax.random.normal(key, (2, length, 2, width), dtype)
        for key in jax.random.split(jax.random.key(0), 3)
    ]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_layout_attends_like_its_tokens(implementation):
    tokens = teacher_forcing(3, 1, 5, chunk_frames=1)
    qkv = arrays(len(tokens))
    want = attention_with_lse(*qkv, tokens, tokens, implementation=implementation)

    @jax.jit
    def crossing(layout, *qkv):
        return layout(*qkv), layout.with_lse(*qkv)

    for known in (tokens, jax.tree.map(jnp.asarray, tokens)):
        layout = lay_out(known, known, implementation=implementation)
        np.testing.assert_allclose(layout(*qkv, known, known), want[0], rtol=2e-5, atol=2e-5)
        out, both = crossing(layout, *qkv)
        for got, wanted in zip((out, *both), (want[0], *want), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


def test_a_layout_is_for_its_own_lengths():
    tokens = grid(2, 1, 5, chunk_frames=1)
    with pytest.raises(ValueError, match="10 query tokens for 12 query rows"):
        lay_out(tokens, tokens)(*arrays(12))


def test_no_kernels_no_layout():
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has a GPU")
    tokens = grid(2, 1, 5, chunk_frames=1)
    with pytest.raises(Unsupported, match="no attention kernels"):
        lay_out(tokens, tokens, implementation="mosaic")


@pytest.mark.parametrize("known", [True, False], ids=["known", "traced"])
@pytest.mark.parametrize("once", [True, False], ids=["layout", "every call"])
def test_maps_are_made_outside_of_the_scan_over_layers(once, known, monkeypatch):
    monkeypatch.setattr(op, "platform", lambda: "gpu")
    monkeypatch.setattr(op, "capability", lambda: "9.0")
    tokens = teacher_forcing(2, 2, 3, chunk_frames=1)
    cfg = DiTConfig(
        dim=64, ffn_dim=8, freq_dim=8, text_dim=4, text_len=2, heads=1, layers=3,
        in_channels=4, out_channels=4, dtype="bfloat16",
    )  # fmt: skip

    def run(latents, text, tokens):
        def every_call(*arguments):
            return attention(*arguments, implementation="mosaic")

        attend = lay_out(tokens, tokens, implementation="mosaic") if once else every_call
        dit = DiT(cfg, rngs=nnx.Rngs(0))
        level = jnp.full((1, 4), 500.0)
        words = dit.text_kv(text)
        return dit(latents, level, words, tokens, attend=attend, remat=True)[0].sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 4, 4, 6, 4), (1, 1, 2, 4))]
    if known:
        jaxpr = jax.make_jaxpr(jax.grad(lambda *xs: run(*xs, tokens)))(*shapes)
    else:
        jaxpr = jax.make_jaxpr(jax.grad(run))(*shapes, jax.tree.map(jnp.asarray, tokens))
    inside = [names(eqn.params["jaxpr"].jaxpr) for eqn in equations(jaxpr.jaxpr) if layers(eqn)]
    assert len(inside) == 2  # of the scans over three layers, forward and backward attend
    assert any(part & MAP_MAKING for part in inside) == (not once and not known)
    assert bool(names(jaxpr.jaxpr) & MAP_MAKING) == (not known)


def layers(eqn) -> bool:
    if eqn.primitive.name != "scan" or eqn.params["length"] != 3:
        return False
    return "wgmma_ref" in names(eqn.params["jaxpr"].jaxpr)
