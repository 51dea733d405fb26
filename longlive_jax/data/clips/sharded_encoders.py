"""The encoders of `longlive data encode` with each clip shared out over the devices of a mesh."""

import concurrent.futures
import dataclasses
import os
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.data.clips.encoding import Encoders, EncodeSpec, Read
from longlive_jax.io.checkpoint import read_manifest
from longlive_jax.io.models import load_model
from longlive_jax.models.params import params_of
from longlive_jax.models.vae import VAEConfig
from longlive_jax.models.vae.sharded import Method, encode_parts, sharing
from longlive_jax.parallel.mesh import BATCH, SP
from longlive_jax.spec import UserError, build
from longlive_jax.typing import Array, Params

__all__ = ["over_mesh"]


def over_mesh(
    encoders: Encoders,
    folder: str | os.PathLike,
    spec: EncodeSpec,
    mesh: Mesh,
    *,
    dtype: Any,
    method: Method | None = None,
) -> Encoders:
    """The same encoders, every clip's frames over the sp axis of `mesh`, whose other axes are 1.

    Of a video file every device's part is decoded apart and by a thread of its own; with "tails"
    no frame twice. Latents are those of one device, to rounding. Working memory does not grow with
    the clip. Raises UserError for clips that do not split.
    """
    held = read_manifest(folder)["components"]["vae"]
    cfg = build(VAEConfig, held, path=f"{folder}: vae")
    try:
        way = sharing(cfg, spec.join.latents, mesh.shape[SP], method)
    except ValueError as error:
        raise UserError(f"--mesh: {error}") from error
    split = NamedSharding(mesh, P(BATCH, SP))

    def frames(read: Read) -> np.ndarray:
        def part(device: int) -> np.ndarray:
            return way.part(lambda first, last: read(first, last)[None], device)

        with concurrent.futures.ThreadPoolExecutor(way.parts) as pool:
            return np.concatenate(list(pool.map(part, range(way.parts))), axis=1)[0]

    def video():
        vae = load_model(folder, "vae", dtype=dtype)
        graphdef = nnx.graphdef(vae)
        params = jax.device_put(params_of(vae), NamedSharding(mesh, P()))

        @jax.jit
        def run(params: Params, parts: Array) -> Array:
            first = parts[:, way.absent : way.absent + 1]
            return encode_parts(graphdef, params, first, parts, mesh, way)

        return lambda parts: np.asarray(run(params, jax.device_put(parts[None], split))[0])

    return dataclasses.replace(encoders, frames=frames, video=video)
