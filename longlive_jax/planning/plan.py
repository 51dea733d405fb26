"""Estimates what a training run needs before any GPU is rented: memory, compute, communication.

Sizes and FLOPs are arithmetic. Peak memory per device and communication volume come from compiling
the real train step (`planning.step`) for the chip (`planning.compile`); nothing is allocated and no
GPU is needed. The peak excludes the CUDA context, NCCL's buffers and allocator fragmentation, so
`RESERVED_BYTES` of the chip's memory are set aside for them.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from longlive_jax.data.clips import store
from longlive_jax.io.checkpoint import CHECKPOINT_MANIFEST, read_manifest
from longlive_jax.models.vae import VAEConfig
from longlive_jax.models.wan import DiTConfig
from longlive_jax.models.wan.cache import CachePolicy
from longlive_jax.models.wan.remat import Remat
from longlive_jax.parallel.mesh import AXES, MeshSpec
from longlive_jax.planning import compile as plan_compile
from longlive_jax.planning.chips import Chip, get_chip
from longlive_jax.planning.memory import bytes_per_device
from longlive_jax.planning.step import (
    Clip,
    PlannedStep,
    num_parameters,
)
from longlive_jax.spec import UserError, build
from longlive_jax.training.stages.clip_batches import CLIP_BATCH_SPECS
from longlive_jax.training.stages.flops import clip_update_cost, forward_flops, recomputed_flops
from longlive_jax.training.stages.wan_ar import WanARStage
from pallas_kernels.dispatch import assumed_device

__all__ = ["PlanSpec", "check_settings", "clip_of", "estimate", "model_of", "scale_to_mesh"]

RESERVED_BYTES = 4 * 2**30
"""Device memory that is not available to a program."""
DEFAULT_CLIP = Clip(frames=384, chunk_frames=8, size=(44, 80, 48))
"""64 s of Wan2.2 latents at 1280x704."""


@dataclasses.dataclass(frozen=True)
class PlanSpec:
    """What to estimate, in addition to the run's config.

    Attributes:
      chip: GPU model of every device; a name in `CHIPS`.
      frames: latent frames per clip.
      chunk_frames: latent frames per chunk.
      size: height, width and channels of a latent frame.
      fastest: whether to try rematerialization policies, fastest first, until one fits, instead of
        the config's own.
      compile: whether to compile the step for its peak memory and communication volume; without it
        the report has only what arithmetic gives.
    """

    chip: str
    frames: int = DEFAULT_CLIP.frames
    chunk_frames: int = DEFAULT_CLIP.chunk_frames
    size: tuple[int, int, int] = DEFAULT_CLIP.size
    fastest: bool = False
    compile: bool = True

    def __post_init__(self) -> None:
        get_chip(self.chip)
        if self.chunk_frames < 1 or self.frames < 1 or self.frames % self.chunk_frames:
            chunk = max(1, self.chunk_frames)
            nearest = max(1, round(self.frames / chunk)) * chunk
            raise UserError(
                f"--frames: {self.frames} latent frames are not a multiple of the "
                f"{self.chunk_frames} frames of a chunk. Set it to {nearest}"
            )
        if min(self.size) < 1 or self.size[0] % 2 or self.size[1] % 2:
            raise UserError(f"--size: height and width must be even, got {self.size}")

    @property
    def clip(self) -> Clip:
        """The clips that the run trains on."""
        return Clip(self.frames, self.chunk_frames, self.size)


def model_of(stage: WanARStage) -> tuple[DiTConfig, str]:
    """DiT settings of the stage's checkpoint and their origin; default: Wan2.2-TI2V-5B."""
    if _has_checkpoint(stage):
        return stage.model(), stage.checkpoint
    model = DiTConfig(**{k: jnp.dtype(v) for k, v in stage.computing().items()})
    return model, f"Wan2.2-TI2V-5B (no checkpoint at {stage.checkpoint})"


def clip_of(stage: WanARStage) -> tuple[Clip, str]:
    """Clips that the run trains on, and their origin.

    If the folder of clips does not exist, this is `DEFAULT_CLIP`, with as many chunks as the error
    buffers have rows if these are aligned with chunks.
    """
    # 1. Clips that the run encodes itself.
    vae = _vae_of(stage)
    if stage.clips is None:
        if not _has_checkpoint(stage):
            return DEFAULT_CLIP, f"default: no checkpoint at {stage.checkpoint}"
        rules, pixels = stage.cut.clip_shape(stage.base)
        height, width = (side // vae.spatial_stride for side in pixels)
        return Clip(rules.latents, rules.chunk_frames, (height, width, vae.z_dim)), "config.cut"
    # 2. Encoded clips on disk.
    folder = Path(stage.clips)
    if (folder / store.STORE_MANIFEST).is_file():
        identity = store.Manifest.read(folder).identity
        join = identity["join"]
        height, width = (side // vae.spatial_stride for side in identity["size"])
        size = height, width, vae.z_dim
        return Clip(join["chunks"] * join["chunk_frames"], join["chunk_frames"], size), stage.clips
    # 3. The length that the error buffers imply.
    buffer = None if stage.recycling is None else stage.recycling.buffer
    if buffer is None or not buffer.aligned or buffer.dealt or buffer.rows == 1:
        return DEFAULT_CLIP, f"default: no clips at {stage.clips}"
    clip = dataclasses.replace(DEFAULT_CLIP, frames=buffer.rows * DEFAULT_CLIP.chunk_frames)
    return clip, f"one chunk per row of the error buffers: no clips at {stage.clips}"


def _has_checkpoint(stage: WanARStage) -> bool:
    """Whether the stage's checkpoint exists; a plan does not need it."""
    try:
        return (stage.base / CHECKPOINT_MANIFEST).is_file()
    except UserError:
        return False


def _vae_of(stage: WanARStage) -> VAEConfig:
    """VAE settings of the stage's checkpoint; default: Wan2.2."""
    if not _has_checkpoint(stage):
        return VAEConfig()
    settings = read_manifest(stage.base)["components"].get("vae", {})
    return build(VAEConfig, settings, path=f"{stage.checkpoint}: vae")


def scale_to_mesh(stage: WanARStage, mesh: MeshSpec, clip: Clip) -> WanARStage:
    """The stage on another mesh, with clips of another length.

    The number of clips per sp group stays the same, so the batch and the groups of error buffers
    scale with data * fsdp. Buffers aligned with the training sequence get one row per chunk if
    their rows do not divide the chunks.

    Raises UserError for a batch that is not a multiple of data * fsdp on the stage's own mesh.
    """
    # 1. The batch.
    before = stage.mesh.samples
    if stage.batch % before:
        raise UserError(
            f"config.batch must be a multiple of config.mesh.data * config.mesh.fsdp = {before}, "
            f"got {stage.batch}"
        )
    batch = stage.batch // before * mesh.samples
    stage = dataclasses.replace(stage, mesh=mesh, batch=batch)
    if stage.recycling is None:
        return stage
    # 2. The error buffers.
    buffer = stage.recycling.buffer
    groups, rows = buffer.groups, buffer.rows
    if groups > 1 and groups % before == 0:
        groups = groups // before * mesh.samples
    if buffer.aligned and clip.chunks % rows:
        rows = clip.chunks
    buffer = dataclasses.replace(buffer, groups=groups, rows=rows)
    return dataclasses.replace(stage, recycling=dataclasses.replace(stage.recycling, buffer=buffer))


def check_settings(stage: WanARStage, model: DiTConfig, spec: PlanSpec) -> None:
    """Raises UserError if model, clips, batch and mesh do not match."""
    clip = spec.clip
    if clip.size[2] != model.in_channels:
        raise UserError(
            f"--size: the model takes latents of {model.in_channels} channels, got {clip.size[2]}"
        )
    try:
        stage.check(model, clip.chunks, clip.chunk_tokens)
        PlannedStep(stage, model, clip).state()
    except ValueError as error:
        raise UserError(f"plan: {error}") from error


def estimate(
    stage: WanARStage, spec: PlanSpec, *, log: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """The report, ready for JSON, in bytes, FLOPs and seconds.

    Keys ending in `_per_step` are totals over all devices, those ending in `_per_device` are for
    one device. `log` receives a line before every compilation.

    Raises UserError before anything is compiled if settings do not match or no compiler is
    available, and Failure if the compilation fails.
    """
    model, origin = model_of(stage)
    check_settings(stage, model, spec)
    if spec.compile and (reason := plan_compile.refusal()) is not None:
        raise UserError(reason)
    search = spec.fastest and spec.compile
    stages = remat_policies(stage, spec.clip) if search else [stage]
    steps = [PlannedStep(candidate, model, spec.clip) for candidate in stages]
    step, measured, rejected = _first_that_fits(steps, spec, log)
    chip = get_chip(spec.chip)
    with assumed_device("gpu", chip.compute_capability):
        settings = _settings(step, spec, chip, origin)
    report = settings | _compute(step, chip) | _memory(step) | measured
    return report | ({"does_not_fit": rejected} if spec.fastest else {})


def _first_that_fits(
    steps: list[PlannedStep], spec: PlanSpec, log: Callable[[str], None]
) -> tuple[PlannedStep, dict[str, Any], list[dict[str, Any]]]:
    """The first step that fits, or else the last; its measurements; and the steps rejected."""
    available, rejected = usable_bytes(get_chip(spec.chip)), []
    for step in steps[:-1]:
        # Skip the compile if a lower bound already exceeds the memory.
        if (least := min_bytes_per_device(step)) > available:
            rejected.append(_remat_policy(step.stage) | {"at_least_bytes_per_device": least})
            continue
        measured = _measure(step, spec, log)
        if measured["fits"]:
            return step, measured, rejected
        peak = {"peak_bytes_per_device": measured["peak_bytes_per_device"]}
        rejected.append(_remat_policy(step.stage) | peak)
    return steps[-1], _measure(steps[-1], spec, log), rejected


def remat_policies(stage: WanARStage, clip: Clip) -> list[WanARStage]:
    """The stage under every rematerialization policy, from most memory to most recomputation."""
    candidates = {1, stage.ffn_chunks if stage.ffn_chunks > 1 else 8}
    tokens = stage.device_tokens(clip.chunks, clip.chunk_tokens)
    ffn_chunks = sorted(n for n in candidates if tokens % n == 0)
    return [
        dataclasses.replace(stage, remat=remat, ffn_chunks=n)
        for remat in get_args(Remat)
        for n in ffn_chunks
    ]


def usable_bytes(chip: Chip) -> int:
    """Device memory available to a program."""
    return chip.memory_bytes - RESERVED_BYTES


def min_bytes_per_device(step: PlannedStep) -> int:
    """Lower bound of a device's peak memory, reached at the end of the forward pass.

    It counts the state and every layer's input, and the output and log-sum-exp of attention where
    they are saved. Without rematerialization it also counts what each layer saves for the backward
    pass: the inputs of its three norms and of its matrix products.
    """
    model = step.model
    stream = jnp.dtype(model.stream_dtype).itemsize
    saved = stream * model.dim
    if step.stage.remat == "attention_saved":
        saved += jnp.dtype(model.dtype).itemsize * model.dim + 4 * model.heads
    if step.stage.remat == "none":
        # Inputs of the linears, rotated q and k, and v; q and output again for cross-attention.
        inputs = 9 * model.dim + (2 * model.ffn_dim if step.stage.ffn_chunks == 1 else 0)
        saved = (stream + 2 * 4) * model.dim + jnp.dtype(model.dtype).itemsize * inputs
    tokens = step.stage.device_tokens(step.clip.chunks, step.clip.chunk_tokens)
    return sum(_state_bytes(step).values()) + model.layers * tokens * saved


def _remat_policy(stage: WanARStage) -> dict[str, Any]:
    return {"remat": stage.remat, "ffn_parts": stage.ffn_chunks}


def _settings(step: PlannedStep, spec: PlanSpec, chip: Chip, origin: str) -> dict[str, Any]:
    """What the report is for: devices, model, clips, batch and precision."""
    stage, clip = step.stage, step.clip
    return {
        "chip": spec.chip,
        "device": chip.name,
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
        "dtype": stage.dtype,
        "stream_dtype": stage.stream_dtype,
        "attention": step.attention(),
        **_remat_policy(stage),
    }


def _compute(step: PlannedStep, chip: Chip) -> dict[str, Any]:
    """FLOPs of one update over all devices; recomputed ones are not part of `flops_per_step`."""
    stage, clip, model = step.stage, step.clip, step.model
    sizes: Any = {"chunks": clip.chunks, "chunk_tokens": clip.chunk_tokens, "window": stage.window}
    adapter = step.trained(step.abstract_mesh).adapter
    work = clip_update_cost(model, batch=stage.batch, adapter=adapter, **sizes)
    forward = forward_flops(model, **sizes)
    recomputed = stage.batch * recomputed_flops(
        model, forward, stage.remat, tokens=work.tokens // stage.batch
    )
    if stage.ffn_chunks > 1:  # the hidden activations once more
        recomputed += 2.0 * model.layers * work.tokens * model.dim * model.ffn_dim
    return {
        "tokens_per_step": work.tokens,
        "flops_per_step": work.flops,
        "flops": dict(work.kinds),
        "recomputed_flops_per_step": recomputed,
        "least_seconds_per_step": (work.flops + recomputed) / (stage.mesh.size * chip.bf16_flops),
    }


def _memory(step: PlannedStep) -> dict[str, Any]:
    """Bytes of a device by purpose, and of the sampler's KV cache for one video."""
    stage, clip, model = step.stage, step.clip, step.model
    tokens = stage.device_tokens(clip.chunks, clip.chunk_tokens)
    width, stream = (jnp.dtype(x).itemsize for x in (model.dtype, model.stream_dtype))
    rows = stage.batch // stage.loop.accumulate // stage.mesh.samples
    prompts = 2 * rows * clip.chunks // stage.mesh.sp
    # Layers whose keys and values of texts exist at the same time.
    layers = model.layers if stage.remat == "none" else 1
    cache = 2 * CachePolicy().slots * clip.chunk_tokens * model.dim * model.layers * width
    return {
        "state_bytes_per_device": _state_bytes(step),
        "activation_bytes_per_device": {
            "layer_inputs": model.layers * tokens * stream * model.dim,
            "keys_and_values_of_a_layer": 2 * width * tokens * model.dim,
            "keys_and_values_of_texts": (2 * width * layers * prompts * model.text_len * model.dim),
        },
        "kv_cache_bytes": cache,
    }


def _state_bytes(step: PlannedStep) -> dict[str, int]:
    """Bytes of a device's shard of the train state, and of one batch."""
    shapes, specs = step.state()
    (trained,), (trained_specs,) = shapes.groups.values(), specs.groups.values()
    mesh = dict(zip(AXES, step.stage.mesh.shape, strict=True))
    batch = {k: P(*CLIP_BATCH_SPECS[k][: x.ndim]) for k, x in step.batch().items()}
    frozen = step.trained(step.abstract_mesh).frozen_shapes()
    frozen_specs = jax.tree.map(lambda x: x.sharding.spec, frozen)
    return {
        "parameters": bytes_per_device(trained.params, trained_specs.params, mesh),
        "frozen_parameters": bytes_per_device(frozen, frozen_specs, mesh),
        "average": bytes_per_device(trained.ema, trained_specs.ema, mesh),
        "moments": bytes_per_device(trained.opt_state, trained_specs.opt_state, mesh),
        "error_buffers": bytes_per_device(shapes.loss_state, specs.loss_state, mesh),
        "batch": bytes_per_device(step.batch(), batch, mesh),
    }


def _measure(step: PlannedStep, spec: PlanSpec, log: Callable[[str], None]) -> dict[str, Any]:
    """Peak memory and communication volume from a compile; None where `spec` does not want one."""
    chip, stage = get_chip(spec.chip), step.stage
    limits = {"device_bytes": chip.memory_bytes, "reserved_bytes": RESERVED_BYTES}
    if not spec.compile:
        names = ("collective_bytes_per_step", "peak_bytes_per_device", "fits")
        return dict.fromkeys(names) | limits
    # 1. Compile.
    policy = ", ".join(f"{k} {v}" for k, v in _remat_policy(stage).items())
    log(f"Compiling the step for {stage.mesh.size} x {chip.name} ({policy}); about a minute.")
    result = plan_compile.compile_step(
        {
            "stage": dataclasses.asdict(stage),
            "model": to_json(step.model),
            "clip": dataclasses.asdict(step.clip),
            "chip": spec.chip,
        }
    )
    # 2. Report.
    sent = sum(kind["bytes"] for kind in result["collectives"].values())
    return {
        "collective_bytes_per_step": sent * stage.mesh.size,
        "collectives_per_device": result["collectives"],
        "peak_bytes_per_device": result["peak"],
        "temporary_bytes_per_device": result["temporary"],
        **limits,
        "fits": result["peak"] <= usable_bytes(chip),
        "compile_seconds": {k: round(x, 1) for k, x in result["seconds"].items()},
    }


def to_json(model: DiTConfig) -> dict[str, Any]:
    """A model's settings, with data types by name."""
    values = dataclasses.asdict(model)
    return values | {k: jnp.dtype(values[k]).name for k in ("dtype", "stream_dtype", "param_dtype")}
