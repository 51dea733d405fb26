"""Attention over cached and own keys: own ones dense or packed, positions absolute or relative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.models.wan import layer_kv
from longlive_jax.models.wan.cache import CachePolicy, empty_cache
from longlive_jax.models.wan.config import DiTConfig
from longlive_jax.models.wan.dit import attention_context
from longlive_jax.models.wan.layer_kv import PackedLayerKV, dense_kv
from longlive_jax.models.wan.packed_cache import KVFormat, pack_keys, pack_values
from longlive_jax.models.wan.positions import apply_rope
from pallas_kernels.attention import attention

CONFIG = DiTConfig(
    dim=64, ffn_dim=8, freq_dim=8, text_dim=8, heads=2, layers=1, in_channels=4, out_channels=4
)
SIZE, BATCH = (2, 2, 2), 2
FORMATS = [
    KVFormat(),
    *(KVFormat("nvfp4", smoothing=s) for s in ("none", "reference", "token_mean", "channel_mean")),
]


def normal(seed):
    """One chunk of queries, keys or values `[b, l, n, d]`."""
    return jax.random.normal(jax.random.key(seed), (BATCH, 8, CONFIG.heads, CONFIG.head_dim))


def problem(form, relative, dtype):
    """Queries, own keys and values, and the layer's cache and context after two chunks."""
    policy = CachePolicy(relative_rope=relative, format=form)
    cache = empty_cache(CONFIG, BATCH, SIZE, policy, dtype=dtype)
    for seed in (0, 2):
        k, v = (normal(s)[None].astype(dtype) for s in (seed, seed + 1))
        cache = cache.write(k, v, cut=jnp.zeros(BATCH, bool))
    context = attention_context(cache.upcoming(noisy=True), cache, CONFIG, relative)
    q, k, v = (normal(seed).astype(dtype) for seed in (4, 5, 6))
    return apply_rope(q, context.q_rotation), (k, v), jax.tree.map(lambda x: x[0], cache), context


def run(q, own, cache, context):
    """Attention as the model compiles it."""
    attend = jax.jit(lambda q, own, past, context: past.attend(q, own, context, attention))
    return np.asarray(attend(q, own, cache.layer_kv, context).astype(jnp.float32))


def packed(own, form):
    form = form if form.packed else KVFormat("nvfp4")
    return pack_keys(own[0], form), pack_values(own[1], form)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.storage}-{form.smoothing}")
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_packed_own_keys_equal_dequantized_ones_bit_for_bit(form, relative, dtype):
    q, own, cache, context = problem(form, relative, dtype)
    own_packed = packed(own, form)
    dense = jax.jit(lambda own: dense_kv(own, dtype))(own_packed)
    got, want = run(q, own_packed, cache, context), run(q, dense, cache, context)
    np.testing.assert_array_equal(got, want)
    assert 1e-4 < np.abs(got - run(q, own, cache, context)).max() < 1.0


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.storage}-{form.smoothing}")
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_dense_own_keys_are_attended_with_the_cached_ones_as_one_sequence(form, relative):
    """Own keys first, then the dequantized slots; keys of relative positions rotate at the end."""
    q, own, cache, context = problem(form, relative, jnp.float32)
    got = run(q, own, cache, context)
    slots = dense_kv((cache.k, cache.v), jnp.float32)
    k, v = (
        jnp.concatenate([x, y.reshape(BATCH, -1, *y.shape[3:])], axis=1)
        for x, y in zip(own, slots, strict=True)
    )
    k = apply_rope(k, context.k_rotation) if relative else k
    if form.packed and form.smoothing == "reference":
        k = k.at[:, :8].add(-k[:, :8].mean(-1, keepdims=True))
    want = attention(q, k, v, context.q_tokens, context.k_tokens)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_the_kernel_takes_own_keys_dense_and_slots_packed(monkeypatch):
    """The Mosaic kernel does not run on a CPU; its arguments are what the layer is to give it."""
    form = KVFormat("nvfp4", reader="mosaic")
    q, own, cache, context = problem(form, False, jnp.float32)
    calls = []
    monkeypatch.setattr(layer_kv, "attention_packed", lambda *args, **_: calls.append(args))
    past = cache.layer_kv
    assert isinstance(past, PackedLayerKV)
    own_packed = packed(own, form)
    past.attend(q, own_packed, context, attention)
    past.attend(q, own, context, attention)
    want = dense_kv(own_packed, jnp.float32)
    for (_, k, v, past_k, past_v, *_), expected in zip(calls, (want, own), strict=True):
        np.testing.assert_array_equal(k, expected[0])
        np.testing.assert_array_equal(v, expected[1])
        np.testing.assert_array_equal(past_k.scales, past.k.array.scales)
        np.testing.assert_array_equal(past_v.codes, past.v.array.codes)
