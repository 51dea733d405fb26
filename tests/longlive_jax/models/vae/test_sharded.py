"""Encoding over a mesh equals encoding the whole clip, at the cost that is said."""

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
    encode_parts,
    encode_sharded,
    flops_per_device,
    lookback,
    sharing,
)
from longlive_jax.parallel.mesh import BATCH, SP, MeshSpec, make_mesh

CFG = VAEConfig(
    encoder_dim=8, decoder_dim=8, z_dim=4, res_blocks=1, decoder_res_blocks=1,
    latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4,
)  # fmt: skip
SHORT, LONG = 16, 48
"""Latents. Windows of the long clip begin after its start on the last devices of every mesh."""
SMALL = {"batch": 1, "size": (16, 16)}


@functools.cache
def model():
    """Random everywhere: fresh kernels ignore the past, and biases would be zero."""
    graphdef, shapes = abstract(lambda: VAE(CFG, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)

    def drawn(path, like):
        noise = rng.standard_normal(like.shape).astype(np.float32)
        kind = path[-1].key
        if kind == "kernel":
            return noise / np.sqrt(np.prod(like.shape[:-1]))
        return 0.1 * noise + (kind == "gamma")

    return graphdef, jax.tree_util.tree_map_with_path(drawn, shapes)


@functools.cache
def clip(latents: int, batch: int = 2, size: tuple[int, int] = (32, 32)):
    rng = np.random.default_rng(2)
    shape = (batch, CFG.num_raw_frames(latents), *size, 3)
    return jnp.asarray(rng.uniform(-1, 1, shape).astype(np.float32))


@jax.jit
def encoded(params, video):
    return encode(with_params(model()[0], params), video)


@functools.cache
def whole(latents: int, **of):
    return encoded(model()[1], clip(latents, **of))


def meshed(sp: int, data: int = 1):
    spec = MeshSpec(data=data, sp=sp)
    return make_mesh(spec, jax.devices()[: spec.size])


def close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(got, want, atol=tolerance * float(jnp.abs(want).max()))


def shared(video, mesh, **options):
    graphdef, params = model()
    return jax.jit(lambda p, x: encode_sharded(graphdef, p, x, mesh, **options))(params, video)


@pytest.mark.parametrize("sp", [2, 8])
def test_exchanged_tails_equal_whole(sp):
    mesh = meshed(sp, data=min(2, 8 // sp))
    got = shared(clip(SHORT), mesh)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P(BATCH, SP)), got.ndim)
    close(got, whole(SHORT))


def test_tails_go_round_to_the_first_device():
    """Three rounds of two devices: the first one's past is then the last one's."""
    assert sharing(CFG, LONG, 2, "tails").rounds == 3
    close(shared(clip(LONG, **SMALL), meshed(2), method="tails"), whole(LONG, **SMALL))


@pytest.mark.parametrize("method", ["halo", "tails"])
def test_working_memory_does_not_grow_with_the_clip(method):
    graphdef, params = model()
    mesh, (short, long) = meshed(2), (64, 192)

    def working(latents):
        way = sharing(CFG, latents, 2, method)
        first, parts = (
            jax.ShapeDtypeStruct((1, n, 32, 32, 3), jnp.float32) for n in (1, 2 * way.frames)
        )
        run = jax.jit(lambda p, a, b: encode_parts(graphdef, p, a, b, mesh, way))
        held = run.lower(params, first, parts).compile().memory_analysis()
        return held.temp_size_in_bytes, 4 * np.prod(parts.shape)

    (before, some), (after, more) = working(short), working(long)
    assert after - before < 1.2 * (more - some)  # the frames themselves, cut into runs


@pytest.mark.parametrize("sp", [2, 8])
def test_halos_equal_whole(sp):
    """On the first devices, whose windows begin with the clip, and the last, whose do not."""
    way = sharing(CFG, LONG, sp, "halo")
    assert way.starts[0] == (0,) < way.starts[-1]
    mesh = meshed(sp)
    got = shared(clip(LONG, **SMALL), mesh, method="halo")
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P(BATCH, SP)), got.ndim)
    close(got, whole(LONG, **SMALL))


def test_the_halo_is_as_long_as_the_encoder_looks_back():
    """What is no number spreads as far as it is seen."""
    assert lookback(CFG) == 4 * sharing(CFG, LONG, 4, "halo").halo == 80
    assert lookback(VAEConfig()) == 4 * sharing(VAEConfig(), 96, 4, "halo").halo == 112
    video = clip(LONG, **SMALL)
    seen = video.shape[1] - 1 - lookback(CFG)
    for frame, hurts in ((seen, True), (seen - 1, False)):
        last = encoded(model()[1], video.at[:, frame].set(jnp.nan))[:, -1]
        assert bool(jnp.isnan(last).any()) == hurts


def test_every_frame_matters():
    """A change of any device's last frame is felt by the next device's latents."""
    graphdef, params = model()
    mesh = meshed(4)
    run = jax.jit(lambda x: encode_sharded(graphdef, params, x, mesh, method="tails"))
    video = clip(SHORT)
    plain = run(video)
    for device in range(3):
        frame = 1 + 4 * (4 * (device + 1) - 1) - 1  # its last one
        moved = np.abs(run(video.at[:, frame].add(0.5)) - plain).max((0, 2, 3, 4))
        assert moved[4 * (device + 1)] > 1e-4
        assert not moved[: 4 * (device + 1) - 1].any()


@pytest.mark.parametrize("method", ["halo", "tails"])
def test_a_device_reads_its_own_part_of_a_clip(method):
    """And that part is enough for latents equal to the whole clip's."""
    video, mesh = np.asarray(clip(LONG, **SMALL)), meshed(4)
    way = sharing(CFG, LONG, 4, method)
    asked = []

    def read(first, last):
        asked.append((first, last))
        return video[:, first:last]

    devices = range(way.parts)
    parts = [jax.device_put(way.part(read, i), mesh.devices.flat[i]) for i in devices]
    held = NamedSharding(mesh, P(BATCH, SP))
    shape = (1, way.parts * way.frames, *video.shape[2:])
    parts = jax.make_array_from_single_device_arrays(shape, held, parts)
    graphdef, params = model()
    got = jax.jit(lambda p, a, b: encode_parts(graphdef, p, a, b, mesh, way))(
        params, video[:, :1], parts
    )
    close(got, whole(LONG, **SMALL))
    assert (
        asked
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


@pytest.mark.parametrize(("latents", "parts", "want"), [(96, 4, 302.5), (384, 4, 1205.4)])
def test_the_default_takes_the_least_work(latents, parts, want):
    """Of the 5B model at 1280x704, in TFLOP."""
    cost = {
        name: flops_per_device(sharing(VAEConfig(), latents, parts, name), VAEConfig(), (704, 1280))
        for name in ("halo", "tails")
    }
    assert sharing(VAEConfig(), latents, parts).method == "tails"
    assert cost["tails"] == pytest.approx(want * 1e12, rel=1e-3) and cost["tails"] < cost["halo"]


def test_default_where_tails_do_not_pay_or_do_not_go():
    assert sharing(CFG, 16, 1).method == "halo"  # the whole clip, as one device encodes it
    assert sharing(CFG, 4, 4).method == "halo"
    assert sharing(CFG, 8, 4).method == "tails"


def test_flops_are_those_of_whole_programs():
    """Counted of pieces, against XLA's count of clips in one."""
    graphdef, params = model()
    for latents in (3, 7):
        shape = jax.ShapeDtypeStruct((1, CFG.num_raw_frames(latents), 32, 32, 3), jnp.float32)
        program = jax.jit(lambda p, x: encode(with_params(graphdef, p), x)).lower(params, shape)
        want = flops_per_device(sharing(CFG, latents, 1), CFG, (32, 32))
        assert program.cost_analysis()["flops"] == pytest.approx(want, rel=2e-3)


@pytest.mark.parametrize(
    ("latents", "sp", "message"),
    [(6, 4, "6 latents do not split"), (4, 4, "1 latents a device are too few")],
)
def test_what_does_not_split_is_refused(latents, sp, message):
    with pytest.raises(ValueError, match=message):
        shared(clip(latents), meshed(sp), method="tails")
