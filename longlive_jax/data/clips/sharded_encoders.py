"""Encoders for `longlive data encode --mesh`, which shard each clip over the devices of a mesh."""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.data.clips.encode_spec import Encoders, EncodeSpec, ReadFrames
from longlive_jax.io.checkpoint import read_manifest
from longlive_jax.io.models import load_model
from longlive_jax.models.params import params_of
from longlive_jax.models.vae import VAEConfig
from longlive_jax.models.vae.sharded import (
    Method,
    VAEShardPlan,
    encode_frame_shards,
    plan_vae_shards,
)
from longlive_jax.parallel.mesh import BATCH, SP
from longlive_jax.spec import UserError, build
from longlive_jax.typing import Array, Params

__all__ = ["shard_encoders"]


def shard_encoders(
    encoders: Encoders,
    folder: str | os.PathLike,
    spec: EncodeSpec,
    mesh: Mesh,
    *,
    dtype: Any,
    method: Method | None = None,
) -> Encoders:
    """The same encoders with each clip sharded by frames over the sp axis of `mesh`.

    Latents equal those of one device up to rounding, and working memory does not depend on the
    clip's length. One thread per device decodes the frames that the device needs; with "tails", no
    frame is decoded twice. Raises UserError if the latents do not divide over the devices.

    Args:
      encoders: the encoders for one device.
      folder: checkpoint directory of the VAE.
      spec: settings of the encoding job.
      mesh: the device mesh; its axes other than sp must be 1.
      dtype: compute dtype of the VAE.
      method: "halo" (each device also encodes the frames that its first latents depend on), "tails"
        (devices exchange the causal padding of every layer), or None for the cheaper one.
    """
    # 1. Plan which device encodes which frames.
    config = read_manifest(folder)["components"]["vae"]
    cfg = build(VAEConfig, config, path=f"{folder}: vae")
    try:
        shard_plan = plan_vae_shards(cfg, spec.join.latents, mesh.shape[SP], method)
    except ValueError as error:
        raise UserError(f"--mesh: {error}") from error

    # 2. Read the frames of all devices.
    def read_video(read: ReadFrames) -> np.ndarray:
        def read_shard(device: int) -> np.ndarray:
            return shard_plan.device_frames(lambda first, last: read(first, last)[None], device)

        devices = range(shard_plan.num_shards)
        with concurrent.futures.ThreadPoolExecutor(shard_plan.num_shards) as pool:
            return np.concatenate(list(pool.map(read_shard, devices)), axis=1)[0]

    load_vae = functools.partial(_load_sharded_vae, folder, mesh, shard_plan, dtype)
    return dataclasses.replace(encoders, read_video=read_video, load_vae=load_vae)


def _load_sharded_vae(
    folder: str | os.PathLike, mesh: Mesh, shard_plan: VAEShardPlan, dtype: Any
) -> Callable[[np.ndarray], np.ndarray]:
    """A function from a clip's frames, those of each device side by side, to its latents."""
    vae = load_model(folder, "vae", dtype=dtype)
    graphdef = nnx.graphdef(vae)
    params = jax.device_put(params_of(vae), NamedSharding(mesh, P()))
    sharding = NamedSharding(mesh, P(BATCH, SP))

    @jax.jit
    def run(params: Params, frames: Array) -> Array:
        first = frames[:, shard_plan.num_padding : shard_plan.num_padding + 1]
        return encode_frame_shards(graphdef, params, first, frames, mesh, shard_plan)

    return lambda frames: np.asarray(run(params, jax.device_put(frames[None], sharding))[0])
