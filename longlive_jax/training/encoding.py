"""Encoding clips over a mesh, exact, every device its own frames (paper, section 2.1)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.models.params import with_params
from longlive_jax.models.vae import VAE, encode_chunk
from longlive_jax.parallel.mesh import BATCH, SP
from longlive_jax.parallel.tails import fetched
from longlive_jax.typing import Array, Float, Params


def encode_shared(
    graphdef: nnx.GraphDef[VAE], params: Params, video: Float[Array, "b f h w 3"], mesh: Mesh
) -> Float[Array, "b g h w z"]:
    """Latents of clips of 1 + 4 (g - 1) frames, samples over data and fsdp, latents over sp.

    The same as encoding them whole. Besides its own frames a device encodes only the clip's first
    one. Raises ValueError if g does not split over sp, or leaves a device fewer than 2 latents.
    """
    parts = mesh.shape[SP]
    latents = (video.shape[1] + 3) // 4
    if latents % parts:
        raise ValueError(
            f"{latents} latents do not split over mesh.sp = {parts}; choose a divisor of {latents}"
        )
    first, rest = video[:, :1], video[:, 1:]
    rest = jnp.pad(rest, ((0, 0), (4, 0), (0, 0), (0, 0), (0, 0)))
    split = P(BATCH, SP)
    run = jax.shard_map(
        functools.partial(_encode_own, graphdef),
        mesh=mesh,
        in_specs=(P(), P(BATCH), split),
        out_specs=split,
        check_vma=False,
    )
    return run(params, first, rest)


def _encode_own(graphdef, params: Params, first: Array, own: Array) -> Array:
    """A device's latents. The first frame leads the first device's, in the place of what is absent;
    the others encode it too, in step, and do not use it."""
    vae = with_params(graphdef, params)
    start, tails = encode_chunk(vae, first)
    latents, _ = encode_chunk(vae, own, fetched(tails, own.shape[1] // 4))
    leading = jnp.concatenate([start, latents[:, 1:]], axis=1)
    return jnp.where(jax.lax.axis_index(SP) == 0, leading, latents)
