"""Training on videos themselves: decoded by workers, encoded on the mesh before every update.

A process decodes only the frames that its devices encode, and these only their own (paper, section
2.1). What a clip is, and the texts, are those of a store that `longlive data encode` made.
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
from longlive_jax.models.vae.sharded import VAEShardPlan, encode_parts, sharing
from longlive_jax.parallel.mesh import SP
from longlive_jax.spec import UserError, build
from longlive_jax.training.feed import own_parts, own_rows, placed, placed_parts
from longlive_jax.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class Live:
    """Clips of a dataset of videos, for a mesh.

    Attributes:
      source: rows of this process's frames.
      shape: of a clip's latents, (f, h, w, c).
      chunks: of a clip.
      left_out: samples that cannot be used, known before one is decoded.
      way: how devices share a clip out.
    """

    source: OnlineClips
    shape: tuple[int, int, int, int]
    chunks: int
    left_out: int
    way: VAEShardPlan


def live_clips(
    dataset: str | Path, store: EncodedClips, checkpoint: str | Path, mesh: Mesh, *, anywhere: bool
) -> Live:
    """The clips of `dataset` by the rules of `store`; UserError for what does not fit together."""
    rules = store.manifest.identity
    held = read_manifest(checkpoint)["components"]["vae"]
    vae = build(VAEConfig, held, path=f"{checkpoint}: vae")
    join, (height, width) = build(JoinSpec, rules["join"], path=str(store.folder)), rules["size"]
    samples = find_samples(dataset)
    good = usable(samples, dataset)
    try:
        way = sharing(vae, join.latents, mesh.shape[SP])
    except ValueError as error:
        raise UserError(f"config.mesh: {error}") from error
    own = own_parts(mesh)
    part = None if len(own) == mesh.shape[SP] else tuple(way.wanted(own).tolist())
    videos = VideoClips(good, join, (height, width), part=part, anywhere=anywhere)
    small = vae.spatial_stride
    shape = (join.latents, height // small, width // small, vae.z_dim)
    return Live(OnlineClips(videos, store), shape, join.chunks, len(samples) - len(good), way)


def placer(
    live: Live, checkpoint: str | Path, mesh: Mesh, specs: dict[str, P], rows: int
) -> Callable[[dict[str, np.ndarray]], dict[str, Array]]:
    """From this process's rows of a batch of `rows`, collated, to the batch with latents on the
    mesh. `specs` say how its columns lie."""
    way, own, first = live.way, own_parts(mesh), own_rows(mesh, rows).start
    frames = way.wanted(own)
    dtype = live.source.store.manifest.identity["computed_in"]
    vae = load_model(checkpoint, "vae", dtype=jnp.dtype(dtype))
    params = jax.device_put(params_of(vae), NamedSharding(mesh, P()))
    encoded = _encoder(nnx.graphdef(vae), way, mesh, specs)

    def place(batch: dict[str, np.ndarray]) -> dict[str, Array]:
        columns = dict(batch)
        video, dropped = columns.pop("video"), columns.pop("dropped")

        def read(begin: int, end: int) -> np.ndarray:
            low, high = np.searchsorted(frames, (begin, end))
            return video[:, low:high]

        parts = np.concatenate([way.part(read, device) for device in own], axis=1)
        counts = np.repeat((dropped == "")[:, None], len(own), axis=1).astype(np.float32)
        over = functools.partial(placed_parts, mesh=mesh, rows=rows, first=first)
        lying = placed(columns, {k: specs[k] for k in columns}, mesh, rows=rows, first=first)
        return encoded(params, over(parts), over(counts), lying)

    return place


def _encoder(graphdef: nnx.GraphDef, way: VAEShardPlan, mesh: Mesh, specs: dict[str, P]) -> Any:
    """`(VAE parameters, parts, counts, columns) -> batch`; a clip that one process could not decode
    counts on none."""

    def run(params: Params, parts: Array, counts: Array, columns: dict[str, Array]):
        first = parts[:, way.absent : way.absent + 1]
        latents = encode_parts(graphdef, params, first, parts, mesh, way).astype(jnp.float32)
        mask = columns["mask"] * jnp.min(counts, axis=1, keepdims=True)
        batch = columns | {"context": latents, "target": latents, "mask": mask}
        return {
            name: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*specs[name])))
            for name, x in batch.items()
        }

    return jax.jit(run)


def count_dropped(dropped: np.ndarray) -> int:
    """Rows that came without their video; each is logged."""
    reasons = [reason for reason in dropped.tolist() if reason]
    for reason in reasons:
        logging.warning("left out %s", reason)
    return len(reasons)
