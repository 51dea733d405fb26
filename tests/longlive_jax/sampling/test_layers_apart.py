"""Parameters and caches with an array per layer: the videos of stacks, without their copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.models.per_layer import PerLayer, is_unstacked, unstack
from longlive_jax.models.wan.cache import CachePolicy, empty_cache
from longlive_jax.models.wan.packed_cache import KVFormat
from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.sampling import engine
from longlive_jax.sampling.drivers import Sampler
from longlive_jax.sampling.load import layers_apart
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.script import Shot, ShotScript
from longlive_jax.sampling.sharding import data_mesh, shard_cache
from tests.longlive_jax.sampling.conftest import Toy

CHUNKS = 6
POLICIES = {
    "dense": CachePolicy(),
    "evicting": CachePolicy(clean_recache=True),
    "relative": CachePolicy(relative_rope=True),
    "all sinks": CachePolicy(window=3),
    "packed": CachePolicy(format=KVFormat("nvfp4")),
    "reference": CachePolicy(format=KVFormat("nvfp4", smoothing="reference")),
}


@pytest.fixture(scope="module")
def wide():
    """A toy whose heads split into NVFP4 blocks."""
    return Toy(dim=64)


def script(wide):
    """Two videos that cut at different chunks."""
    return [
        wide.inputs([0, 1], cut=(i == 2, i == 4), shot=(int(i >= 2), int(i >= 4)))
        for i in range(CHUNKS)
    ]


def stream(wide, sampler, params, cache):
    """The latents of the script step by step, and the cache after it."""
    latents, conditioning = [], wide.conditioning((0, 1))
    for chunk in map(wide.with_text_kv, script(wide)):
        x, cache = sampler.step(params, cache, conditioning, chunk)
        latents.append(np.asarray(x))
    return np.concatenate(latents, axis=1), cache


@pytest.mark.parametrize("name", POLICIES)
def test_videos_are_those_of_stacks(wide, name):
    """To rounding: products of packed keys fall on another side of a rounding now and then."""
    policy = POLICIES[name]
    want, stacked = wide.scan(script(wide), wide.conditioning((0, 1)), rows=2, policy=policy)
    cache = empty_cache(wide.config, 2, wide.size, policy, per_layer=True)
    got, cache = stream(wide, wide.sampler, layers_apart(wide.params), cache)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(cache.slot_chunk, stacked.slot_chunk)
    assert is_unstacked(cache.k) and cache.nbytes == stacked.nbytes
    assert cache.bytes_per_token == stacked.bytes_per_token
    if not policy.format.packed:
        np.testing.assert_allclose(jnp.stack(cache.k.arrays), stacked.k, atol=1e-5)


def test_the_cache_is_updated_in_place(wide):
    cache = empty_cache(wide.config, 2, wide.size, CachePolicy(), per_layer=True)
    chunk = wide.with_text_kv(script(wide)[0])
    arguments = layers_apart(wide.params), cache, wide.conditioning((0, 1)), chunk
    memory = wide.sampler.step.lower(*arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    pointers = [x.unsafe_buffer_pointer() for x in cache.k.arrays]
    _, after = wide.sampler.step(*arguments)
    assert [x.unsafe_buffer_pointer() for x in after.k.arrays] == pointers


def test_one_chunk_written_to_stacks_and_apart(wide):
    """`KVCache.write`, which takes the keys and values of all layers at once."""
    shape = (wide.config.layers, 2, 24, wide.config.heads, wide.config.head_dim)
    k, v = (jax.random.normal(jax.random.key(seed), shape) for seed in (0, 1))
    cut = jnp.zeros(2, bool)
    for policy in (POLICIES["dense"], POLICIES["packed"]):
        stacked, unstacked = (
            empty_cache(wide.config, 2, wide.size, policy, per_layer=each).write(k, v, cut=cut)
            for each in (False, True)
        )
        jax.tree.map(
            np.testing.assert_array_equal,
            unstack((stacked.k, stacked.v)),
            (unstacked.k, unstacked.v),
        )


def test_a_mesh_shares_the_videos(wide):
    mesh = data_mesh(make_mesh(MeshSpec(data=2), jax.devices()[:2]))
    sampler = Sampler(wide.graphdef, mesh=mesh)
    cache = empty_cache(wide.config, 2, wide.size, CachePolicy(), per_layer=True)
    params = layers_apart(wide.params)
    want, _ = stream(wide, wide.sampler, params, jax.tree.map(jnp.copy, cache))
    got, after = stream(wide, sampler, params, shard_cache(mesh, cache))
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert len(after.k.arrays[0].sharding.device_set) == 2


def test_stacks_can_be_consumed(wide):
    """One at a time: the parameters never exist twice."""
    params = jax.tree.map(jnp.copy, wide.params)
    leaves = jax.tree.leaves(params["blocks"])
    unstacked = layers_apart(params, consume=True)
    assert all(x.is_deleted() for x in leaves)
    assert all(
        isinstance(x, PerLayer)
        for x in jax.tree.leaves(unstacked["blocks"], is_leaf=lambda x: isinstance(x, PerLayer))
    )
    assert not is_unstacked({k: v for k, v in unstacked.items() if k != "blocks"})


def test_a_loaded_engine_has_layers_apart_where_that_pays(tiny_checkpoint, tiny, monkeypatch):
    """As on GPUs, here on a CPU: the frames are those of stacks."""
    monkeypatch.setattr(engine, "PLATFORMS_WITH_LAYERS_APART", ("cpu",))
    pipe = Pipeline.from_checkpoint(tiny_checkpoint)
    script = ShotScript((Shot("a cat runs", chunks=2), Shot("a dog sleeps", chunks=2)), seed=3)
    frames = pipe.sample(script)
    assert is_unstacked(pipe.engine.params["blocks"])
    assert is_unstacked(pipe.engine.cache(1, (64, 32)).k)
    assert not is_unstacked(tiny.engine.params)
    assert np.abs(frames.astype(int) - tiny.sample(script)).max() <= 2
