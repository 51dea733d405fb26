"""What Balanced SP buys: one update from frames to gradient, against the naive cut.

The naive way (paper, section 2.1) encodes the whole clip on every device and cuts [all clean; all
noisy] as it comes. Both give the same loss. On CPUs the devices are parts of one machine, so what
is timed there is the work of all of them together.
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
from longlive_jax.models.vae.sharded import encode_sharded, sharing
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
    """One clip of `chunks` chunks of `chunk` latents of the built-in VAE, `size` pixels square."""

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
                f"sp is {self.sp} for {self.chunks} chunks; give at least 2, and a divisor of them"
            )

    @property
    def latents(self) -> int:
        """Of the clip."""
        return self.chunks * self.chunk_frames


def bench_balanced(spec: BalancedSpec) -> dict[str, Any]:
    """Seconds of encoding and of loss with gradient, both ways, and how much longer naive takes."""
    mesh = make_mesh(MeshSpec(sp=spec.sp), jax.devices()[: spec.sp])
    vae = load_model(builtin_checkpoint(), "vae")
    found = {
        name: _timed(spec, mesh, vae, balanced=name == "balanced") for name in ("balanced", "naive")
    }
    balanced, naive = (sum(x["seconds"].values()) for x in found.values())
    return {
        "machine": machine(),
        "spec": report_settings(spec),
        **found,
        "naive_over_balanced": round(naive / balanced, 3),
    }


def _timed(spec: BalancedSpec, mesh: Mesh, vae: VAE, *, balanced: bool) -> dict[str, Any]:
    run = functools.partial(_encoded, nnx.graphdef(vae), mesh=mesh, balanced=balanced)
    encoder, weights = jax.jit(run), params_of(vae)
    frames = jnp.zeros((1, 4 * spec.latents - 3, spec.size, spec.size, 3))
    latents = encoder(weights, frames)
    update, params = _update(spec, mesh, latents.shape[2:], balanced=balanced)
    loss, _ = update(params, latents)
    raw = sharing(vae.cfg, spec.latents, spec.sp).frames if balanced else frames.shape[1]
    half = spec.latents * 2 // spec.sp
    return {
        "raw_frames_encoded_per_device": raw,
        "learnt_frames_per_device": [half // 2] * spec.sp if balanced else _naive(spec, half),
        "loss": round(float(loss), 6),
        "seconds": {
            "encode": repeated(lambda: encoder(weights, frames), spec.repeats)["median"],
            "update": repeated(lambda: update(params, latents), spec.repeats)["median"],
        },
    }


def _naive(spec: BalancedSpec, slice_: int) -> list[int]:
    """Noisy frames in each slice of [all clean; all noisy]."""
    return [min(max((p + 1) * slice_ - spec.latents, 0), slice_) for p in range(spec.sp)]


def _encoded(graphdef, params: Params, frames: Array, *, mesh: Mesh, balanced: bool) -> Array:
    if balanced:
        return encode_sharded(graphdef, params, frames, mesh)

    def whole(params: Params, frames: Array) -> Array:
        return encode(with_params(graphdef, params), frames)

    everywhere = jax.shard_map(
        whole, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False
    )
    return everywhere(params, frames)


def _update(spec: BalancedSpec, mesh: Mesh, latent: tuple[int, ...], *, balanced: bool):
    """A jitted (parameters, latents) -> loss and gradient, and parameters."""
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
    setup = ARSetup(graphdef, spec.chunk_frames, empty_prompt=0, spec=ARLossSpec())
    shared = ShardedLoss(mesh, specs, layout=BALANCED if balanced else CONTIGUOUS)
    text = jax.random.normal(jax.random.key(1), (1, model.text_len, model.text_dim))

    @jax.jit
    def update(params: Params, latents: Array):
        def loss(params: Params):
            episode = _episode(spec, latents)
            return sharded_teacher_forcing_loss(
                setup, shared, params, episode, jax.random.key(2), text
            )[0]

        return jax.value_and_grad(loss)(params)

    return update, params


def _episode(spec: BalancedSpec, latents: Array) -> TeacherForcingBatch:
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
