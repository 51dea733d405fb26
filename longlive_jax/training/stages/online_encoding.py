"""Training directly on videos, which are encoded on the mesh before every update.

Worker processes decode the frames. A process decodes only the frames that its devices encode, and
each device encodes only its own (paper, section 2.1). Clip boundaries and text features come from a
store that `longlive data encode` made.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.data.clips.clip_plan import JoinSpec
from longlive_jax.data.clips.dataset import find_samples, usable
from longlive_jax.data.clips.online import OnlineClips
from longlive_jax.data.clips.source import VideoClips
from longlive_jax.data.clips.store import EncodedClips
from longlive_jax.io.checkpoint import read_manifest
from longlive_jax.io.models import load_model
from longlive_jax.models.params import params_of
from longlive_jax.models.vae import VAEConfig
from longlive_jax.models.vae.sharded import VAEShardPlan, encode_frame_shards, plan_vae_shards
from longlive_jax.parallel.mesh import SP
from longlive_jax.spec import UserError, build
from longlive_jax.training.feed import (
    device_put_batch,
    device_put_shards,
    process_rows,
    process_shards,
)
from longlive_jax.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class OnlineData:
    """The clips of a video dataset, for encoding on a mesh.

    Attributes:
      source: rows with this process's raw frames.
      shape: shape of a clip's latents, (f, h, w, c).
      chunks: number of chunks per clip.
      left_out: number of samples that are already known to be unusable.
      shard_plan: assignment of a clip's raw frames to devices.
    """

    source: OnlineClips
    shape: tuple[int, int, int, int]
    chunks: int
    left_out: int
    shard_plan: VAEShardPlan


def online_clips(
    dataset: str | Path, store: EncodedClips, checkpoint: str | Path, mesh: Mesh, *, anywhere: bool
) -> OnlineData:
    """The clips of `dataset`, cut and prompted as in `store`.

    With `anywhere`, clips begin at random frames of their videos. Raises UserError if dataset,
    store, checkpoint and mesh do not match.
    """
    # 1. Read the settings of the store and of the VAE.
    identity = store.manifest.identity
    settings = read_manifest(checkpoint)["components"]["vae"]
    vae = build(VAEConfig, settings, path=f"{checkpoint}: vae")
    join = build(JoinSpec, identity["join"], path=str(store.folder))
    height, width = identity["size"]
    samples = find_samples(dataset)
    good = usable(samples, dataset)
    # 2. Assign frames to devices.
    try:
        shard_plan = plan_vae_shards(vae, join.latents, mesh.shape[SP])
    except ValueError as error:
        raise UserError(f"config.mesh: {error}") from error
    own = process_shards(mesh)
    all_local = len(own) == mesh.shape[SP]
    part = None if all_local else tuple(shard_plan.frame_indices(own).tolist())
    videos = VideoClips(good, join, (height, width), part=part, anywhere=anywhere)
    space = vae.spatial_stride
    shape = (join.latents, height // space, width // space, vae.z_dim)
    left_out = len(samples) - len(good)
    return OnlineData(OnlineClips(videos, store), shape, join.chunks, left_out, shard_plan)


def make_online_encoder(
    clips: OnlineData, checkpoint: str | Path, mesh: Mesh, specs: dict[str, P], rows: int
) -> Callable[[dict[str, np.ndarray]], dict[str, Array]]:
    """A function that encodes a batch and puts it on the mesh.

    It takes this process's rows of a batch of `rows`, collated, and returns the batch with latents
    as global arrays, sharded by `specs` (PartitionSpec of each column).
    """
    shard_plan, own = clips.shard_plan, process_shards(mesh)
    first = process_rows(mesh, rows).start
    frames = shard_plan.frame_indices(own)
    dtype = clips.source.store.manifest.identity["computed_in"]
    vae = load_model(checkpoint, "vae", dtype=jnp.dtype(dtype))
    params = jax.device_put(params_of(vae), NamedSharding(mesh, P()))
    encode = _encoder(nnx.graphdef(vae), shard_plan, mesh, specs)
    put_shards = functools.partial(device_put_shards, mesh=mesh, rows=rows, first=first)

    def encode_batch(batch: dict[str, np.ndarray]) -> dict[str, Array]:
        columns = dict(batch)
        video, dropped = columns.pop("video"), columns.pop("dropped")

        def read(begin: int, end: int) -> np.ndarray:
            low, high = np.searchsorted(frames, (begin, end))
            return video[:, low:high]

        shards = [shard_plan.device_frames(read, device) for device in own]
        frame_shards = np.concatenate(shards, axis=1)
        decoded = np.repeat((dropped == "")[:, None], len(own), axis=1).astype(np.float32)
        column_specs = {k: specs[k] for k in columns}
        on_mesh = device_put_batch(columns, column_specs, mesh, rows=rows, first=first)
        return encode(params, put_shards(frame_shards), put_shards(decoded), on_mesh)

    return encode_batch


def _encoder(
    graphdef: nnx.GraphDef, shard_plan: VAEShardPlan, mesh: Mesh, specs: dict[str, P]
) -> Any:
    """A jitted function (VAE parameters, frame shards, decoded flags, columns) -> batch.

    A clip that one of the processes could not decode is masked out on all of them.
    """

    def run(params: Params, frame_shards: Array, decoded: Array, columns: dict[str, Array]):
        first = frame_shards[:, shard_plan.num_padding : shard_plan.num_padding + 1]
        latents = encode_frame_shards(graphdef, params, first, frame_shards, mesh, shard_plan)
        latents = latents.astype(jnp.float32)
        mask = columns["mask"] * jnp.min(decoded, axis=1, keepdims=True)
        batch = columns | {"context": latents, "target": latents, "mask": mask}
        return {
            name: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*specs[name])))
            for name, x in batch.items()
        }

    return jax.jit(run)


def count_dropped(dropped: np.ndarray) -> int:
    """Number of rows whose video could not be decoded; logs the reason for each."""
    reasons = [reason for reason in dropped.tolist() if reason]
    for reason in reasons:
        logging.warning("left out %s", reason)
    return len(reasons)
