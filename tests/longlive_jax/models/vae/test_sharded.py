"""Encoding over a mesh equals encoding the full clip, at the stated cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.models.params import abstract, with_params
from longlive_jax.models.vae import VAE, VAEConfig, encode
from longlive_jax.models.vae.sharded import (
    encode_frame_shards,
    encode_sharded,
    flops_per_device,
    lookback,
    plan_vae_shards,
)
from longlive_jax.parallel.mesh import BATCH, SP, MeshSpec, make_mesh

CFG = VAEConfig(
    encoder_dim=8, decoder_dim=8, z_dim=4, res_blocks=1, decoder_res_blocks=1,
    latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4,
)  # fmt: skip
SHORT, LONG = 16, 48
"""Latents per clip. The last devices' windows of the long clip begin after its start."""
SMALL = {"batch": 1, "size": (16, 16)}


@functools.cache
def model():
    """A VAE with random weights: initial kernels would ignore the past, and biases be zero."""
    graphdef, shapes = abstract(lambda: VAE(CFG, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        kind = path[-1].key
        if kind == "kernel":
            return noise / np.sqrt(np.prod(leaf.shape[:-1]))
        return 0.1 * noise + (kind == "gamma")

    return graphdef, jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def clip(latents: int, batch: int = 2, size: tuple[int, int] = (32, 32)):
    rng = np.random.default_rng(2)
    shape = (batch, CFG.num_raw_frames(latents), *size, 3)
    return jnp.asarray(rng.uniform(-1, 1, shape).astype(np.float32))


@jax.jit
def encoded(params, video):
    return encode(with_params(model()[0], params), video)


@functools.cache
def full(latents: int, **settings):
    """The latents of `clip`, encoded on one device."""
    return encoded(model()[1], clip(latents, **settings))


def mesh_of(sp: int, data: int = 1):
    spec = MeshSpec(data=data, sp=sp)
    return make_mesh(spec, jax.devices()[: spec.size])


def assert_close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(got, want, atol=tolerance * float(jnp.abs(want).max()))


def sharded(video, mesh, **options):
    graphdef, params = model()
    return jax.jit(lambda p, x: encode_sharded(graphdef, p, x, mesh, **options))(params, video)


@pytest.mark.parametrize("sp", [2, 8])
def test_tails_equal_the_full_clip(sp):
    mesh = mesh_of(sp, data=min(2, 8 // sp))
    got = sharded(clip(SHORT), mesh)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P(BATCH, SP)), got.ndim)
    assert_close(got, full(SHORT))


def test_tails_pass_from_the_last_device_to_the_first():
    """In three rounds of two devices."""
    assert plan_vae_shards(CFG, LONG, 2, "tails").rounds == 3
    assert_close(sharded(clip(LONG, **SMALL), mesh_of(2), method="tails"), full(LONG, **SMALL))


@pytest.mark.parametrize("method", ["halo", "tails"])
def test_working_memory_is_independent_of_the_clip(method):
    graphdef, params = model()
    mesh, (short, long) = mesh_of(2), (64, 192)

    def memory(latents):
        shard_plan = plan_vae_shards(CFG, latents, 2, method)
        first, frames = (
            jax.ShapeDtypeStruct((1, n, 32, 32, 3), jnp.float32) for n in (1, 2 * shard_plan.frames)
        )
        run = jax.jit(lambda p, a, b: encode_frame_shards(graphdef, p, a, b, mesh, shard_plan))
        analysis = run.lower(params, first, frames).compile().memory_analysis()
        return analysis.temp_size_in_bytes, 4 * np.prod(frames.shape)

    (short_temp, short_input), (long_temp, long_input) = memory(short), memory(long)
    # Only the frames themselves, split into steps.
    assert long_temp - short_temp < 1.2 * (long_input - short_input)


@pytest.mark.parametrize("sp", [2, 8])
def test_halos_equal_the_full_clip(sp):
    """On the first devices, whose windows begin with the clip, and on the last, whose do not."""
    shard_plan = plan_vae_shards(CFG, LONG, sp, "halo")
    assert shard_plan.starts[0] == (0,) < shard_plan.starts[-1]
    mesh = mesh_of(sp)
    got = sharded(clip(LONG, **SMALL), mesh, method="halo")
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P(BATCH, SP)), got.ndim)
    assert_close(got, full(LONG, **SMALL))


def test_the_halo_is_as_long_as_the_receptive_field():
    """A NaN frame reaches a latent if and only if the frame is in its receptive field."""
    assert lookback(CFG) == 4 * plan_vae_shards(CFG, LONG, 4, "halo").halo == 80
    assert lookback(VAEConfig()) == 4 * plan_vae_shards(VAEConfig(), 96, 4, "halo").halo == 112
    video = clip(LONG, **SMALL)
    earliest = video.shape[1] - 1 - lookback(CFG)
    for frame, is_visible in ((earliest, True), (earliest - 1, False)):
        last = encoded(model()[1], video.at[:, frame].set(jnp.nan))[:, -1]
        assert bool(jnp.isnan(last).any()) == is_visible


def test_every_boundary_frame_matters():
    """A change of a device's last frame changes the next device's latents, and no earlier ones."""
    graphdef, params = model()
    mesh = mesh_of(4)
    run = jax.jit(lambda x: encode_sharded(graphdef, params, x, mesh, method="tails"))
    video = clip(SHORT)
    original = run(video)
    for device in range(3):
        frame = 1 + 4 * (4 * (device + 1) - 1) - 1  # its last one
        change = np.abs(run(video.at[:, frame].add(0.5)) - original).max((0, 2, 3, 4))
        assert change[4 * (device + 1)] > 1e-4
        assert not change[: 4 * (device + 1) - 1].any()


@pytest.mark.parametrize("method", ["halo", "tails"])
def test_a_device_reads_only_its_own_frames(method):
    """These suffice for latents equal to those of the full clip."""
    video, mesh = np.asarray(clip(LONG, **SMALL)), mesh_of(4)
    shard_plan = plan_vae_shards(CFG, LONG, 4, method)
    ranges = []

    def read(first, last):
        ranges.append((first, last))
        return video[:, first:last]

    # 1. Read the frames of each device onto it.
    devices = range(shard_plan.num_shards)
    shards = [
        jax.device_put(shard_plan.device_frames(read, i), mesh.devices.flat[i]) for i in devices
    ]
    sharding = NamedSharding(mesh, P(BATCH, SP))
    shape = (1, shard_plan.num_shards * shard_plan.frames, *video.shape[2:])
    frames = jax.make_array_from_single_device_arrays(shape, sharding, shards)
    # 2. Encode them.
    graphdef, params = model()
    got = jax.jit(lambda p, a, b: encode_frame_shards(graphdef, p, a, b, mesh, shard_plan))(
        params, video[:, :1], frames
    )
    assert_close(got, full(LONG, **SMALL))
    assert (
        ranges
        == {
            "tails": [
                (0, 21),
                (93, 117),
                (21, 45),
                (117, 141),
                (45, 69),
                (141, 165),
                (69, 93),
                (165, 189),
            ],
            "halo": [(0, 129), (0, 129), (12, 141), (60, 189)],
        }[method]
    )


@pytest.mark.parametrize(("latents", "num_shards", "want"), [(96, 4, 302.5), (384, 4, 1205.4)])
def test_the_default_method_needs_the_fewest_flops(latents, num_shards, want):
    """In TFLOP for the 5B model at 1280x704."""
    cfg = VAEConfig()
    cost = {
        name: flops_per_device(plan_vae_shards(cfg, latents, num_shards, name), cfg, (704, 1280))
        for name in ("halo", "tails")
    }
    assert plan_vae_shards(cfg, latents, num_shards).method == "tails"
    assert cost["tails"] == pytest.approx(want * 1e12, rel=1e-3) and cost["tails"] < cost["halo"]


def test_the_default_method_is_halo_where_tails_are_impossible_or_useless():
    assert plan_vae_shards(CFG, 16, 1).method == "halo"  # one device encodes the full clip
    assert plan_vae_shards(CFG, 4, 4).method == "halo"
    assert plan_vae_shards(CFG, 8, 4).method == "tails"


def test_flops_of_pieces_add_up_to_those_of_a_full_clip():
    """The latter as XLA counts them."""
    graphdef, params = model()
    for latents in (3, 7):
        shape = jax.ShapeDtypeStruct((1, CFG.num_raw_frames(latents), 32, 32, 3), jnp.float32)
        program = jax.jit(lambda p, x: encode(with_params(graphdef, p), x)).lower(params, shape)
        want = flops_per_device(plan_vae_shards(CFG, latents, 1), CFG, (32, 32))
        assert program.cost_analysis()["flops"] == pytest.approx(want, rel=2e-3)


@pytest.mark.parametrize(
    ("latents", "sp", "message"),
    [(6, 4, "6 latents do not split"), (4, 4, "1 latents per device are too few")],
)
def test_clips_that_do_not_split_are_errors(latents, sp, message):
    with pytest.raises(ValueError, match=message):
        sharded(clip(latents), mesh_of(sp), method="tails")
