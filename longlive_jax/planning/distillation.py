"""Estimates the memory of a distillation: three models, two adapters, two updates.

Sizes are arithmetic. The peak of a device is the larger one of the two updates, each compiled for
the chip as the run compiles it (`planning.distillation_step`).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from longlive_jax.data.clips import store
from longlive_jax.io.builtin import BUILTIN
from longlive_jax.io.checkpoint import CHECKPOINT_MANIFEST
from longlive_jax.models.vae import VAEConfig
from longlive_jax.models.wan import DiTConfig
from longlive_jax.models.wan.packed_cache import empty_packed
from longlive_jax.parallel.mesh import AXES, MeshSpec
from longlive_jax.planning import compile as plan_compile
from longlive_jax.planning.chips import get_chip
from longlive_jax.planning.distillation_step import PlannedDistillation
from longlive_jax.planning.memory import bytes_per_device
from longlive_jax.planning.plan import (
    DEFAULT_CLIP,
    RESERVED_BYTES,
    PlanSpec,
    to_json,
    usable_bytes,
)
from longlive_jax.planning.step import Clip, num_parameters
from longlive_jax.spec import UserError
from longlive_jax.training.objectives.dmd.roles import CRITIC_BACKBONE, STUDENT_BACKBONE, TEACHER
from longlive_jax.training.stages.backbones import model_of
from longlive_jax.training.stages.wan_dmd import WanDMDStage
from pallas_kernels.dispatch import assumed_device

__all__ = ["ROLES", "estimate_distillation", "on_mesh", "video_of"]

ROLES = {"student": STUDENT_BACKBONE, "critic": CRITIC_BACKBONE, "teacher": TEACHER}
"""The models' names in the report, and among frozen parameters."""


def video_of(stage: WanDMDStage) -> tuple[Clip, str]:
    """The videos that the student samples, and their origin."""
    chunk_frames, size = DEFAULT_CLIP.chunk_frames, DEFAULT_CLIP.size
    folder = None if stage.prompts is None else Path(stage.prompts)
    origin = f"default: no prompts at {stage.prompts}"
    if folder is not None and (folder / store.STORE_MANIFEST).is_file():
        identity, vae = store.Manifest.read(folder).identity, VAEConfig()
        height, width = (side // vae.spatial_stride for side in identity["size"])
        chunk_frames, size = identity["join"]["chunk_frames"], (height, width, vae.z_dim)
        origin = str(stage.prompts)
    return Clip(stage.rollout.chunks * chunk_frames, chunk_frames, size), origin


def on_mesh(stage: WanDMDStage, mesh: MeshSpec) -> WanDMDStage:
    """The stage on another mesh, with as many videos on every device.

    Raises UserError for a batch that is not a multiple of data * fsdp on the stage's own mesh.
    """
    before = stage.mesh.samples
    if stage.batch % before:
        raise UserError(
            f"config.batch must be a multiple of config.mesh.data * config.mesh.fsdp = {before}, "
            f"got {stage.batch}"
        )
    return dataclasses.replace(stage, mesh=mesh, batch=stage.batch // before * mesh.samples)


def estimate_distillation(
    stage: WanDMDStage, spec: PlanSpec, *, log: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """The report, ready for JSON, in bytes and seconds; sizes are those of one device.

    `log` receives a line before every compilation. Raises UserError before anything is compiled if
    settings do not match or no compiler is available, and Failure if a compilation fails.
    """
    # 1. The updates of the run.
    clip = spec.clip
    rollout = dataclasses.replace(stage.rollout, chunks=clip.chunks)
    stage = dataclasses.replace(stage, rollout=rollout, init_adapters=None)
    model, origin = _model(stage)
    steps = [PlannedDistillation(stage, model, clip, group) for group in stage.updates(0)]
    mesh: Any = AbstractMesh(stage.mesh.shape, AXES, axis_types=(AxisType.Auto,) * 3)
    _check(steps[0], mesh)
    if spec.compile and (reason := plan_compile.refusal()) is not None:
        raise UserError(reason)
    # 2. Sizes, then peaks.
    with assumed_device("gpu", get_chip(spec.chip).compute_capability):
        sizes = _roles(steps[0], mesh) | _memory(steps[0], mesh)
    saved = sum(role["shared_bytes"] for role in sizes["roles"].values())
    return _settings(steps[0], spec, origin) | sizes | _measure(steps, spec, saved, log)


def _model(stage: WanDMDStage) -> tuple[DiTConfig, str]:
    """DiT settings of the stage's checkpoint and their origin; default: Wan2.2-TI2V-5B.

    Raises UserError for a checkpoint whose DiT is missing or packed.
    """
    if (Path(stage.checkpoint) / CHECKPOINT_MANIFEST).is_file() or stage.checkpoint == BUILTIN:
        return model_of(stage.base, **stage.computing()), stage.checkpoint
    model = DiTConfig(**{k: jnp.dtype(v) for k, v in stage.computing().items()})
    return model, f"Wan2.2-TI2V-5B (no checkpoint at {stage.checkpoint})"


def _check(step: PlannedDistillation, mesh: Any) -> None:
    """Raises UserError if model, videos, batch and mesh do not match."""
    if step.clip.size[2] != step.model.in_channels:
        raise UserError(
            f"--size: the model takes latents of {step.model.in_channels} channels, got "
            f"{step.clip.size[2]}"
        )
    step.stage.check(step.model, step.setup())
    try:
        step.trainer(mesh)
        step.frozen(mesh)
    except ValueError as error:
        raise UserError(f"plan: {error}") from error


def _settings(step: PlannedDistillation, spec: PlanSpec, origin: str) -> dict[str, Any]:
    """What the report is for: devices, models, videos and batch."""
    stage, clip = step.stage, step.clip
    return {
        "chip": spec.chip,
        "device": get_chip(spec.chip).name,
        "devices": stage.mesh.size,
        "mesh": dict(zip(AXES, stage.mesh.shape, strict=True)),
        "model": origin,
        "parameters": num_parameters(step.model),
        "latent_frames": clip.frames,
        "seconds_of_video": round((1 + 4 * (clip.frames - 1)) / 24, 2),
        "chunk": clip.chunk_frames,
        "size": list(clip.size),
        "batch": stage.batch,
        "accumulate": stage.loop.accumulate,
        "sampling_steps": stage.rollout.steps,
        "dtype": stage.dtype,
        "stream_dtype": stage.stream_dtype,
        "remat": stage.remat,
        "ffn_parts": stage.ffn_chunks,
    }


def _roles(step: PlannedDistillation, mesh: Any) -> dict[str, Any]:
    """The frozen models by role: precision, bytes, and the bytes that another role has already."""
    roles, arrays = step.roles(), step.frozen(mesh)
    names = {name: role for role, name in ROLES.items()}
    report: dict[str, Any] = {}
    for role, name in ROLES.items():
        if name not in roles.backbones:  # the critic's, which is the student's
            report[role] = report["student"] | {"bytes": 0, "shared_with": "student"}
            continue
        original, shapes = roles.original(name), arrays[name]
        size = bytes_per_device(shapes, jax.tree.map(lambda x: x.sharding.spec, shapes), mesh.shape)
        is_copy = original != name
        report[role] = {
            "precision": roles.backbones[name].form.policy,
            "bytes": 0 if is_copy else size,
            "shared_with": names[original] if is_copy else None,
            "shared_bytes": size if is_copy else 0,
        }
    return {"roles": report}


def _memory(step: PlannedDistillation, mesh: Any) -> dict[str, Any]:
    """Bytes of a device by purpose."""
    trainer, stage, model, clip = step.trainer(mesh), step.stage, step.model, step.clip

    def total(part: str) -> int:
        pairs = zip(trainer.abstract.groups.values(), trainer.specs.groups.values(), strict=True)
        return sum(
            bytes_per_device(getattr(x, part), getattr(specs, part), mesh.shape)
            for x, specs in pairs
        )

    rows = stage.batch // stage.loop.accumulate // stage.mesh.samples
    tokens = rows * clip.chunks * clip.chunk_tokens // stage.mesh.sp
    return {
        "state_bytes_per_device": {
            "adapters": total("params"),
            "average": total("ema"),
            "moments": total("opt_state"),
        },
        "activation_bytes_per_device": {
            "layer_inputs": model.layers
            * tokens
            * model.dim
            * jnp.dtype(model.stream_dtype).itemsize,
            "kv_cache": _kv_bytes(stage, model, tokens),
        },
    }


def _kv_bytes(stage: WanDMDStage, model: DiTConfig, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` tokens in all layers."""
    form = stage.rollout.format
    if not form.packed:
        return 2 * model.layers * tokens * model.dim * jnp.dtype(model.dtype).itemsize
    shape = (model.layers, 1, 1, tokens, model.heads, model.head_dim)
    pair = jax.eval_shape(lambda: empty_packed(shape, form))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pair))


def _measure(
    steps: list[PlannedDistillation], spec: PlanSpec, saved: int, log: Callable[[str], None]
) -> dict[str, Any]:
    """Peaks of the updates from compiles; None where `spec` does not want them.

    `saved` bytes of the arguments are arrays of two roles, which a device has once.
    """
    chip = get_chip(spec.chip)
    limits = {"device_bytes": chip.memory_bytes, "reserved_bytes": RESERVED_BYTES}
    if not spec.compile:
        names = ("collective_bytes_per_step", "peak_bytes_per_device", "fits")
        return dict.fromkeys(names) | limits
    # 1. Compile both.
    updates: dict[str, Any] = {}
    for step in steps:
        devices = step.stage.mesh.size
        log(f"Compiling the {step.group}'s update for {devices} x {chip.name}; some minutes.")
        job = {
            "stage": dataclasses.asdict(step.stage),
            "model": to_json(step.model),
            "clip": dataclasses.asdict(step.clip),
            "chip": spec.chip,
            "group": step.group,
        }
        result = plan_compile.compile_step(job)
        sent = sum(kind["bytes"] for kind in result["collectives"].values())
        updates[step.group] = {
            "peak_bytes_per_device": result["peak"] - saved,
            "argument_bytes_per_device": result["arguments"] - saved,
            "temporary_bytes_per_device": result["temporary"],
            "collective_bytes_per_step": sent * devices,
            "compile_seconds": {k: round(x, 1) for k, x in result["seconds"].items()},
        }
    # 2. The larger one decides.
    peak = max(update["peak_bytes_per_device"] for update in updates.values())
    sent = max(update["collective_bytes_per_step"] for update in updates.values())
    return {
        "updates": updates,
        "collective_bytes_per_step": sent,
        "peak_bytes_per_device": peak,
        **limits,
        "fits": peak <= usable_bytes(chip),
    }
