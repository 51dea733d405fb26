"""Encoding over a mesh equals encoding the whole clip, and costs a device its own frames."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.models.params import params_of
from longlive_jax.models.vae import VAE, VAEConfig, encode
from longlive_jax.parallel.mesh import BATCH, SP, MeshSpec, make_mesh
from longlive_jax.training.encoding import encode_shared

CFG = VAEConfig(
    encoder_dim=8, decoder_dim=8, z_dim=4, res_blocks=1, decoder_res_blocks=1,
    latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4,
)  # fmt: skip


@pytest.fixture(scope="module")
def vae():
    """Random everywhere: fresh kernels ignore the past, and biases would be zero."""
    model = VAE(CFG, rngs=nnx.Rngs(0))
    params = params_of(model)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.graphdef(model), jax.tree.unflatten(tree, noise)


@functools.cache
def clip(latents: int):
    return jax.random.uniform(
        jax.random.key(2), (2, 1 + 4 * (latents - 1), 32, 32, 3), minval=-1, maxval=1
    )


@pytest.mark.parametrize("sp", [2, 4, 8])
def test_shared_encoding_equals_whole(vae, sp):
    graphdef, params = vae
    video = clip(16)
    spec = MeshSpec(data=min(2, 8 // sp), sp=sp)
    mesh = make_mesh(spec, jax.devices()[: spec.size])
    got = jax.jit(lambda p, x: encode_shared(graphdef, p, x, mesh))(params, video)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P(BATCH, SP)), got.ndim)
    want = jax.jit(lambda p, x: encode(nnx.merge(graphdef, nnx.State(p)), x))(params, video)
    np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()))


def test_every_frame_matters(vae):
    """A change of any device's last frame is felt by the next device's latents."""
    graphdef, params = vae
    mesh = make_mesh(MeshSpec(sp=4), jax.devices()[:4])
    run = jax.jit(lambda x: encode_shared(graphdef, params, x, mesh))
    video = clip(16)
    plain = run(video)
    for device in range(3):
        frame = 1 + 4 * (4 * (device + 1) - 1) - 1  # its last one
        moved = np.abs(run(video.at[:, frame].add(0.5)) - plain).max((0, 2, 3, 4))
        assert moved[4 * (device + 1)] > 1e-4
        assert not moved[: 4 * (device + 1) - 1].any()


@pytest.mark.parametrize(
    ("latents", "sp", "message"),
    [(6, 4, "6 latents do not split"), (4, 4, "1 latents a device are too few")],
)
def test_what_does_not_split_is_refused(vae, latents, sp, message):
    graphdef, params = vae
    mesh = make_mesh(MeshSpec(sp=sp), jax.devices()[:sp])
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: encode_shared(graphdef, params, clip(latents), mesh))
