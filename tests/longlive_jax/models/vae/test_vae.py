"""The VAE against the reference, and chunked processing against full clips."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.bench.timing import Compilations
from longlive_jax.interop import keys_vae
from longlive_jax.models.params import abstract, with_params
from longlive_jax.models.vae import VAE, VAEConfig, decode, decode_chunk, encode, encode_chunk

TINY = VAEConfig(
    encoder_dim=4,
    decoder_dim=4,
    z_dim=4,
    res_blocks=1,
    latent_mean=(0.1, -0.2, 0.3, 0.0),
    latent_std=(0.5, 1.0, 1.5, 2.0),
)


@pytest.fixture(scope="module")
def golden(goldens):
    with np.load(goldens / "vae22.npz") as z:
        return {key: z[key] for key in z.files}


@pytest.fixture(scope="module")
def reference(golden):
    """The VAE of the golden file, loaded through the converter's key table."""
    sizes = json.loads(bytes(golden["__meta__"]))["config"]
    cfg = VAEConfig(
        encoder_dim=sizes["dim"],
        decoder_dim=sizes["dec_dim"],
        z_dim=sizes["z_dim"],
        res_blocks=sizes["num_res_blocks"],
        latent_mean=tuple(map(float, golden["latent_mean"])),
        latent_std=tuple(map(float, golden["latent_std"])),
    )
    weights = {k.removeprefix("w/"): v for k, v in golden.items() if k.startswith("w/")}
    graphdef, shapes = abstract(lambda: VAE(cfg, rngs=nnx.Rngs(0)))
    table = keys_vae.original_for(weights)
    leaves = table.forward({key: value.shape for key, value in weights.items()})
    arrays = {leaf.path: jnp.asarray(leaf.to_param(weights[leaf.keys[0]])) for leaf in leaves}
    params = jax.tree_util.tree_map_with_path(
        lambda path, _: arrays[tuple(str(key.key) for key in path)], shapes
    )
    return with_params(graphdef, params)


@pytest.fixture(scope="module")
def tiny():
    """A VAE with random weights everywhere, so that every layer has an effect."""
    vae = VAE(TINY, rngs=nnx.Rngs(0))
    state = nnx.state(vae)
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    nnx.update(vae, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), state))
    return vae


def last(x):
    return jnp.asarray(np.moveaxis(x, 1, -1))


def relative(got, want):
    return float(jnp.abs(got - want).max() / jnp.abs(want).max())


def test_equals_the_reference(golden, reference):
    z = jax.jit(encode)(reference, last(golden["pixels"]))
    frames = jax.jit(decode)(reference, last(golden["z_in"]))
    assert relative(z, last(golden["z"])) < 1e-5
    assert relative(frames, last(golden["pixels_out"])) < 1e-5


def test_streaming_equals_the_reference(golden, reference):
    z = last(golden["z_in"])
    first, tails = decode_chunk(reference, z[:, :2])
    rest, _ = decode_chunk(reference, z[:, 2:], tails)
    assert relative(jnp.concatenate([first, rest], 1), last(golden["pixels_out"])) < 1e-5


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunked_equals_the_full_clip(tiny, chunk):
    video = jax.random.uniform(jax.random.key(2), (2, 21, 32, 32, 3), minval=-1)
    z = encode(tiny, video)
    chex.assert_shape(z, (2, 6, 2, 2, 4))
    chex.assert_trees_all_close(encode(tiny, video, chunk_frames=chunk), z, rtol=1e-5, atol=1e-5)
    frames = decode(tiny, z)
    chex.assert_shape(frames, (2, 21, 32, 32, 3))
    chex.assert_trees_all_close(decode(tiny, z, chunk_frames=chunk), frames, rtol=1e-4, atol=1e-5)


def test_one_compilation_serves_every_chunk_after_the_first(tiny):
    step = jax.jit(decode_chunk)
    z = jax.random.normal(jax.random.key(3), (1, 8, 2, 2, 4))
    with Compilations() as compilations:
        frames, tails = step(tiny, z[:, :2])
        for i in (2, 4, 6):
            more, tails = step(tiny, z[:, i : i + 2], tails)
            frames = jnp.concatenate([frames, more], axis=1)
    assert compilations.counts["decode_chunk"] == 2  # one for the first chunk, one for all others
    chex.assert_trees_all_close(frames, decode(tiny, z), rtol=1e-4, atol=1e-5)


def test_decoding_is_causal(tiny):
    z = jax.random.normal(jax.random.key(4), (1, 5, 2, 2, 4))
    changed = z.at[:, 3:].add(1.0)
    a, b = decode(tiny, z), decode(tiny, changed)
    chex.assert_trees_all_equal(a[:, :9], b[:, :9])
    assert jnp.abs(a[:, 9:] - b[:, 9:]).max() > 1e-3


def test_gradients_are_finite_on_a_black_clip(tiny):
    graphdef, state = nnx.split(tiny)

    def loss(state):
        vae = nnx.merge(graphdef, state)
        return jnp.mean(decode(vae, encode(vae, jnp.zeros((1, 5, 32, 32, 3)))) ** 2)

    chex.assert_tree_all_finite(jax.grad(loss)(state))


def test_parameter_count_equals_wan():
    _, shapes = abstract(lambda: VAE(VAEConfig(), rngs=nnx.Rngs(0)))
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(shapes)) == 704_688_668


@pytest.mark.parametrize("shape", [(1, 3, 32, 32, 3), (1, 5, 24, 32, 3)])
def test_sizes_that_do_not_fit_are_errors(tiny, shape):
    with pytest.raises(ValueError, match=r"3 frames cannot|24x32 pixels"):
        encode(tiny, jnp.zeros(shape))


def test_later_chunks_need_full_latents(tiny):
    _, tails = encode_chunk(tiny, jnp.zeros((1, 5, 32, 32, 3)))
    with pytest.raises(ValueError, match="give 4n frames"):
        encode_chunk(tiny, jnp.zeros((1, 5, 32, 32, 3)), tails)


@pytest.mark.parametrize("change", [{"temporal_down": (True,)}, {"latent_std": (1.0,)}])
def test_inconsistent_configs_are_errors(change):
    with pytest.raises(ValueError, match=r"stage|latent channel"):
        VAEConfig(**change)
