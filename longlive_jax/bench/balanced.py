"""Balanced SP against contiguous SP: one update from frames to gradient.

The contiguous baseline (paper, section 2.1) encodes the full clip on every device and cuts
[all clean; all noisy] into equal slices. Both give the same loss. On CPUs the devices are simulated
on one machine, so the times there are the work of all devices together.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.bench.contiguous_sp import CONTIGUOUS
from longlive_jax.bench.timing import machine, repeated, report_settings
from longlive_jax.io.builtin import builtin_checkpoint
from longlive_jax.io.models import load_model
from longlive_jax.models.params import abstract, params_of, with_params
from longlive_jax.models.vae import VAE, encode
from longlive_jax.models.vae.sharded import encode_sharded, plan_vae_shards
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.parallel import rules
from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.training.objectives.batch import (
    ARLossSpec,
    TeacherForcingBatch,
)
from longlive_jax.training.objectives.sharded import (
    BALANCED,
    ShardedLoss,
    sharded_teacher_forcing_loss,
)
from longlive_jax.training.objectives.teacher_forcing import (
    ARSetup,
)
from longlive_jax.typing import Array, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalancedSpec:
    """Sizes of the benchmark: one clip of the built-in VAE, and a small DiT.

    Attributes:
      sp: devices along the sequence axis.
      chunks: chunks per clip, a multiple of `sp`.
      chunk_frames: latent frames per chunk.
      size: height and width of the clip in pixels.
      dim: width of the DiT.
      layers: layers of the DiT.
      repeats: number of timed calls.
    """

    sp: int = 4
    chunks: int = 8
    chunk_frames: int = 4
    size: int = 64
    dim: int = 128
    layers: int = 2
    repeats: int = 3

    def __post_init__(self) -> None:
        if self.sp < 2 or self.chunks % self.sp:
            raise ValueError(
                f"sp must be >= 2 and a divisor of chunks = {self.chunks}, got {self.sp}"
            )

    @property
    def latents(self) -> int:
        """Latent frames per clip."""
        return self.chunks * self.chunk_frames


def bench_balanced(spec: BalancedSpec) -> dict[str, Any]:
    """Seconds of encoding and of loss with gradient under both layouts, and their ratio.

    Needs `spec.sp` devices. The report is ready for JSON; contiguous SP is called "naive" in it.
    """
    mesh = make_mesh(MeshSpec(sp=spec.sp), jax.devices()[: spec.sp])
    vae = load_model(builtin_checkpoint(), "vae")
    results = {
        name: _measure(spec, mesh, vae, balanced=name == "balanced")
        for name in ("balanced", "naive")
    }
    balanced, contiguous = (sum(x["seconds"].values()) for x in results.values())
    return {
        "machine": machine(),
        "spec": report_settings(spec),
        **results,
        "naive_over_balanced": round(contiguous / balanced, 3),
    }


def _measure(spec: BalancedSpec, mesh: Mesh, vae: VAE, *, balanced: bool) -> dict[str, Any]:
    """Frames per device, loss and seconds under one of the two layouts."""
    # 1. Encode the clip.
    run = functools.partial(_encode, nnx.graphdef(vae), mesh=mesh, balanced=balanced)
    encoder, weights = jax.jit(run), params_of(vae)
    frames = jnp.zeros((1, 4 * spec.latents - 3, spec.size, spec.size, 3))
    latents = encoder(weights, frames)
    # 2. Compute loss and gradient.
    update, params = _make_update(spec, mesh, latents.shape[2:], balanced=balanced)
    loss, _ = update(params, latents)
    # 3. Time both.
    raw = plan_vae_shards(vae.cfg, spec.latents, spec.sp).frames if balanced else frames.shape[1]
    half = spec.latents * 2 // spec.sp
    learnt = [half // 2] * spec.sp if balanced else _noisy_frames(spec, half)
    return {
        "raw_frames_encoded_per_device": raw,
        "learnt_frames_per_device": learnt,
        "loss": round(float(loss), 6),
        "seconds": {
            "encode": repeated(lambda: encoder(weights, frames), spec.repeats)["median"],
            "update": repeated(lambda: update(params, latents), spec.repeats)["median"],
        },
    }


def _noisy_frames(spec: BalancedSpec, length: int) -> list[int]:
    """Noisy frames in each slice of `length` frames of [all clean; all noisy]."""
    return [min(max((p + 1) * length - spec.latents, 0), length) for p in range(spec.sp)]


def _encode(graphdef, params: Params, frames: Array, *, mesh: Mesh, balanced: bool) -> Array:
    """Latents of a clip, encoded over the mesh or in full on every device."""
    if balanced:
        return encode_sharded(graphdef, params, frames, mesh)

    def encode_full(params: Params, frames: Array) -> Array:
        return encode(with_params(graphdef, params), frames)

    replicated = jax.shard_map(
        encode_full, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False
    )
    return replicated(params, frames)


def _make_update(spec: BalancedSpec, mesh: Mesh, latent: tuple[int, ...], *, balanced: bool):
    """A jitted (parameters, latents) -> (loss, gradient), and the parameters."""
    # 1. A small DiT, sharded over the mesh.
    model = DiTConfig(
        dim=spec.dim,
        ffn_dim=4 * spec.dim,
        freq_dim=64,
        text_dim=64,
        text_len=16,
        heads=spec.sp,
        layers=spec.layers,
        in_channels=latent[-1],
        out_channels=latent[-1],
    )

    def init(key: Array) -> Params:
        return params_of(DiT(model, rngs=nnx.Rngs(key)))

    params, specs = rules.init_sharded(init, jax.random.key(0), mesh, rules.DIT)
    graphdef = abstract(lambda: DiT(model, rngs=nnx.Rngs(0)))[0]
    # 2. The teacher-forcing loss under the layout.
    setup = ARSetup(graphdef, spec.chunk_frames, empty_prompt=0, spec=ARLossSpec())
    sharded_loss = ShardedLoss(mesh, specs, layout=BALANCED if balanced else CONTIGUOUS)
    text = jax.random.normal(jax.random.key(1), (1, model.text_len, model.text_dim))

    @jax.jit
    def update(params: Params, latents: Array):
        def loss(params: Params):
            batch = _make_batch(spec, latents)
            return sharded_teacher_forcing_loss(
                setup, sharded_loss, params, batch, jax.random.key(2), text
            )[0]

        return jax.value_and_grad(loss)(params)

    return update, params


def _make_batch(spec: BalancedSpec, latents: Array) -> TeacherForcingBatch:
    """A clip whose chunks are denoised after their full clean history, with one prompt."""
    chunk = jnp.tile(jnp.arange(spec.chunks, dtype=jnp.int32), 2)[None]
    return TeacherForcingBatch(
        context=latents,
        target=latents,
        mask=jnp.ones(latents.shape[:2]),
        chunk_index=chunk,
        start=spec.chunk_frames * chunk,
        window_start=jnp.zeros_like(chunk),
        sink=jnp.full_like(chunk, -1),
        prompt=jnp.zeros_like(chunk),
    )
