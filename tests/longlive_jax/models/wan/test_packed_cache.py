"""Keys and values in NVFP4: what is stored, in which slot, in how many bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.models.wan.cache import CachePolicy, empty_cache
from longlive_jax.models.wan.config import DiTConfig
from longlive_jax.models.wan.packed_cache import KVFormat, pack_keys, pack_values
from longlive_jax.spec import UserError
from pallas_kernels.nvfp4 import dequantize, pack, quantize

CONFIG = DiTConfig(
    dim=64, ffn_dim=8, freq_dim=8, text_dim=8, heads=2, layers=2, in_channels=4, out_channels=4
)
SIZE = (2, 2, 2)
NVFP4 = KVFormat("nvfp4")
NO_CUT = jnp.array([False])


def form(smoothing):
    return dataclasses.replace(NVFP4, smoothing=smoothing)


def chunk(seed, batch=1, layers=CONFIG.layers):
    """Keys with one large channel, and values, of one chunk."""
    keys = jax.random.split(jax.random.key(seed), 2)
    k, v = (jax.random.normal(key, (layers, batch, 8, CONFIG.heads, 32)) for key in keys)
    return k.at[..., 3].add(20.0), v


def test_every_layer_and_sample_is_quantized_on_its_own():
    k, v = chunk(0, batch=2)
    cache = empty_cache(CONFIG, 2, SIZE, CachePolicy(format=form("none")))
    cache = cache.write(k, v, cut=jnp.zeros(2, bool))
    for packed, x in ((cache.k, k), (cache.v, v)):
        want = quantize(x[1, 1], rule="mse")
        got = jax.tree.map(lambda leaf: leaf[1, 1, 0], packed).array
        np.testing.assert_array_equal(got.codes.astype(jnp.float32), want.codes.astype(jnp.float32))
        np.testing.assert_array_equal(
            got.scales.astype(jnp.float32), want.scales.astype(jnp.float32)
        )
        assert got.amax == want.amax and packed.amax.shape == (2, 2, 3)


def test_a_chunk_is_packed_once_and_never_moved():
    """Slots of sinks stay the same byte for byte while other slots are overwritten."""
    policy = CachePolicy(format=NVFP4)
    cache = empty_cache(CONFIG, 1, SIZE, policy)
    write = jax.jit(lambda c, kv, cut: c.write(*kv, cut=cut))
    slot_chunks = []
    for i in range(6):
        cache = write(cache, chunk(i), jnp.array([i == 2]))
        slot_chunks.append(np.asarray(cache.slot_chunk[0]).tolist())
    assert slot_chunks[2:] == [[0, 1, 2], [0, 3, 2], [0, 4, 2], [0, 5, 2]]
    empty, leaves = empty_cache(CONFIG, 1, SIZE, policy), jax.tree.leaves((cache.k, cache.v))
    for slot, index in ((0, 0), (2, 2), (1, 5)):
        alone = write(empty, chunk(index), NO_CUT)
        for got, want in zip(leaves, jax.tree.leaves((alone.k, alone.v)), strict=True):
            np.testing.assert_array_equal(got[:, :, slot], want[:, :, 0])


def test_slots_are_those_of_a_dense_cache():
    cuts = np.random.default_rng(0).random((12, 3)) < 0.3
    plain, packed = (
        empty_cache(CONFIG, 3, SIZE, CachePolicy(format=f)) for f in (KVFormat(), NVFP4)
    )
    write = jax.jit(lambda c, kv, cut: c.write(*kv, cut=cut))
    for i, cut in enumerate(cuts):
        plain, packed = (write(c, chunk(i % 2, batch=3), jnp.asarray(cut)) for c in (plain, packed))
        for name in ("slot_chunk", "start", "sink_start", "sink_length", "num_chunks"):
            np.testing.assert_array_equal(getattr(plain, name), getattr(packed, name))
    error = np.abs(packed.k.dequantize(jnp.float32) - plain.k)
    assert error.max() < 0.6  # one step of the format


@pytest.mark.parametrize("smoothing", ["none", "reference", "token_mean", "channel_mean"])
def test_means_are_stored_and_added_back(smoothing):
    k, _ = chunk(0, layers=1)
    packed = pack_keys(k[0], form(smoothing))
    mean = {"token_mean": (1, 8, 2, 1), "channel_mean": (1, 1, 2, 32)}.get(smoothing)
    assert (packed.offset is None) == (mean is None)
    got = dequantize(packed.array, jnp.float32)
    if packed.offset is not None:
        assert packed.offset.shape == mean
        got += packed.offset.astype(jnp.float32)
        exact = quantize(k[0] - packed.offset.astype(jnp.float32), rule="mse", lead=1)
        np.testing.assert_array_equal(packed.codes, pack(exact.codes))
        np.testing.assert_array_equal(packed.amax, exact.amax)
    error = float(jnp.linalg.norm(got - k[0]) / jnp.linalg.norm(k[0]))
    assert error < (0.05 if smoothing == "channel_mean" else 0.12)


def test_channel_mean_smoothing_absorbs_a_constant_in_a_channel():
    """k + c has the error of k; without smoothing the error is far larger."""
    k, _ = chunk(0, layers=1)
    shifted = k.at[..., 7].add(64.0)

    def error(x, smoothing):
        return float(jnp.abs(pack_keys(x, form(smoothing)).dequantize(jnp.float32) - x).mean())

    plain = error(k, "channel_mean")
    assert error(shifted, "channel_mean") < 1.1 * plain and error(shifted, "none") > 2 * plain


def test_size():
    """The 5B model's heads and chunks; token means cost the most."""
    cfg = DiTConfig(layers=2)
    sizes = {}
    for name in ("none", "channel_mean", "token_mean"):
        policy = CachePolicy(format=form(name))
        cache = jax.eval_shape(lambda policy=policy: empty_cache(cfg, 1, (8, 22, 40), policy))
        sizes[name] = cache.bytes_per_token / 2 / 24, cache.compression
    assert sizes["none"][0] == pytest.approx(144, abs=0.01)
    assert [round(ratio, 3) for _, ratio in sizes.values()] == [3.556, 3.555, 3.507]
    small = empty_cache(CONFIG, 1, SIZE, CachePolicy(format=NVFP4))
    real = sum(x.on_device_size_in_bytes() for x in jax.tree.leaves((small.k, small.v)))
    assert small.nbytes == real


def test_writing_happens_in_place():
    cache = empty_cache(CONFIG, 3, SIZE, CachePolicy(window=9, format=NVFP4))
    packed = jax.jit(cache.pack)(*chunk(0, batch=3))
    insert = jax.jit(lambda c, packed, cut: c.insert(packed, cut=cut), donate_argnums=0)
    compiled = insert.lower(cache, packed, jnp.zeros(3, bool)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes / 4  # eight slots
    pointer = cache.k.codes.unsafe_buffer_pointer()
    assert insert(cache, packed, jnp.zeros(3, bool)).k.codes.unsafe_buffer_pointer() == pointer


def test_invalid_formats_are_refused():
    narrow = dataclasses.replace(CONFIG, heads=8)
    with pytest.raises(UserError, match="multiple of 16 channels, this model has heads of 8"):
        empty_cache(narrow, 1, SIZE, CachePolicy(format=NVFP4))
    with pytest.raises(UserError, match="relative_rope stores unrotated ones"):
        CachePolicy(relative_rope=True, format=KVFormat("nvfp4", reader="mosaic"))
    v = jax.eval_shape(lambda: pack_values(chunk(0)[1], NVFP4))
    assert v.shape == (2, 1, 8, 2, 32) and v.offset is None
