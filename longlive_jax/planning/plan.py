"""What a training run would need, before a machine is rented: memory, operations, traffic.

Sizes and operations are arithmetic. The peak memory of a device and what devices send each other
come from compiling the real train step (`plan_step`) for the chip (`plan_compile`); nothing is
allocated and no GPU is needed. Not in the peak, and so held back from the chip's memory: the CUDA
context, NCCL's buffers and what an allocator cannot use.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from longlive_jax.data.clips import store
from longlive_jax.io.checkpoint import MANIFEST, read_manifest
from longlive_jax.models.vae import VAEConfig
from longlive_jax.models.wan import DiTConfig
from longlive_jax.models.wan.cache import CachePolicy
from longlive_jax.parallel import rules
from longlive_jax.parallel.mesh import AXES, MeshSpec
from longlive_jax.planning import compile as plan_compile
from longlive_jax.planning.chips import Chip, chip_of
from longlive_jax.planning.step import NAMED, STAND_IN, Clip, PlannedStep, parameters
from longlive_jax.spec import UserError, build
from longlive_jax.training.stages.clip_batches import BATCH_SPECS
from longlive_jax.training.stages.flops import clips_cost, forward_flops
from longlive_jax.training.stages.wan_ar import WanARStage

__all__ = ["PlanSpec", "check", "clip_of", "model_of", "moved", "plan"]

RESERVED = 4 * 2**30
"""Bytes of a device that a program cannot have."""
WHOLE = Clip(frames=384, chunk_frames=8, size=(44, 80, 48))
"""64 s of Wan2.2's latents at 1280x704."""


@dataclasses.dataclass(frozen=True)
class PlanSpec:
    """What is asked for beside the run's config.

    Attributes:
      chip: of every device; a name of `CHIPS`.
      frames: latent frames of a clip.
      chunk_frames: latent frames of a chunk.
      size: height, width and channels of a latent frame.
      fastest: try ways to recompute, the fastest first, until one fits; else the config's.
      compile: find the peak and the traffic; else only what arithmetic gives.
    """

    chip: str
    frames: int = WHOLE.frames
    chunk_frames: int = WHOLE.chunk_frames
    size: tuple[int, int, int] = WHOLE.size
    fastest: bool = False
    compile: bool = True

    def __post_init__(self) -> None:
        chip_of(self.chip)
        if self.chunk_frames < 1 or self.frames < 1 or self.frames % self.chunk_frames:
            near = max(1, round(self.frames / max(1, self.chunk_frames))) * max(
                1, self.chunk_frames
            )
            raise UserError(
                f"--frames: {self.frames} latent frames are no whole number of chunks of "
                f"{self.chunk_frames}; choose {near}"
            )
        if min(self.size) < 1 or self.size[0] % 2 or self.size[1] % 2:
            raise UserError(f"--size: {self.size}; height and width must be even")

    @property
    def clip(self) -> Clip:
        """The clips trained on."""
        return Clip(self.frames, self.chunk_frames, self.size)


def model_of(stage: WanARStage) -> tuple[DiTConfig, str]:
    """The DiT of the stage's checkpoint, and where it is from; without one Wan2.2-TI2V-5B."""
    if (Path(stage.checkpoint) / MANIFEST).is_file():
        return stage.model(), stage.checkpoint
    model = DiTConfig(**{k: jnp.dtype(v) for k, v in stage.computing().items()})
    return model, f"Wan2.2-TI2V-5B (there is no {stage.checkpoint})"


def clip_of(stage: WanARStage) -> tuple[Clip, str]:
    """What the run is trained on, and where that is from.

    Without the folder of clips: `WHOLE`, but with a chunk for every row of the error buffers if
    they have rows.
    """
    folder = Path(stage.clips)
    if (folder / store.MANIFEST).is_file():
        made = store.Manifest.read(folder).identity
        vae, join = _vae_of(stage), made["join"]
        height, width = (side // vae.spatial_stride for side in made["size"])
        size = height, width, vae.z_dim
        return Clip(join["chunks"] * join["chunk_frames"], join["chunk_frames"], size), stage.clips
    buffer = None if stage.recycling is None else stage.recycling.buffer
    if buffer is None or not buffer.aligned or buffer.dealt or buffer.rows == 1:
        return WHOLE, f"there is no {stage.clips}"
    clip = dataclasses.replace(WHOLE, frames=buffer.rows * WHOLE.chunk_frames)
    return clip, f"a chunk a row of the error buffers: there is no {stage.clips}"


def _vae_of(stage: WanARStage) -> VAEConfig:
    """Of the stage's checkpoint; without one Wan2.2's."""
    if not (Path(stage.checkpoint) / MANIFEST).is_file():
        return VAEConfig()
    held = read_manifest(stage.checkpoint)["components"].get("vae", {})
    return build(VAEConfig, held, path=f"{stage.checkpoint}: vae")


def moved(stage: WanARStage, mesh: MeshSpec, clip: Clip) -> WanARStage:
    """The stage on another mesh and with clips of another length.

    Devices that share a sequence have as many clips as before; so the batch grows or shrinks, and
    so do the groups of error buffers. Buffers by column get a row a chunk if theirs do not fit.
    Raises UserError for a batch that does not split over the stage's own mesh.
    """
    before = stage.mesh.samples
    if stage.batch % before:
        raise UserError(
            f"config.batch = {stage.batch} does not split over config.mesh.data * config.mesh.fsdp "
            f"= {before}; choose a multiple"
        )
    batch = stage.batch // before * mesh.samples
    stage = dataclasses.replace(stage, mesh=mesh, batch=batch)
    if stage.recycling is None:
        return stage
    buffer = stage.recycling.buffer
    groups, rows = buffer.groups, buffer.rows
    if groups > 1 and groups % before == 0:
        groups = groups // before * mesh.samples
    if buffer.aligned and clip.chunks % rows:
        rows = clip.chunks
    buffer = dataclasses.replace(buffer, groups=groups, rows=rows)
    return dataclasses.replace(stage, recycling=dataclasses.replace(stage.recycling, buffer=buffer))


def check(stage: WanARStage, model: DiTConfig, spec: PlanSpec) -> None:
    """UserError for a model, clip, batch or mesh that do not fit each other."""
    clip = spec.clip
    if clip.size[2] != model.in_channels:
        raise UserError(
            f"--size: latents of {clip.size[2]} channels for a model of {model.in_channels}"
        )
    try:
        stage.check(model, clip.chunks, clip.chunk_tokens)
        PlannedStep(stage, model, clip).state()
    except ValueError as error:
        raise UserError(f"plan: {error}") from error


def plan(
    stage: WanARStage, spec: PlanSpec, *, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """The report, ready for JSON; bytes, floating point operations and seconds.

    Names end in what they are of: `_per_step` all devices together, `_per_device` one of them.
    `say` hears of every compilation. Raises UserError, before anything is compiled, for what does
    not fit each other or if there is no compiler, and Failure if that fails.
    """
    model, origin = model_of(stage)
    check(stage, model, spec)
    if spec.compile and (why := plan_compile.refusal()) is not None:
        raise UserError(why)
    ways = policies(stage, spec.clip) if spec.fastest and spec.compile else [stage]
    steps = [PlannedStep(way, model, spec.clip) for way in ways]
    step, measured, refused = _first_that_fits(steps, spec, say)
    chip = chip_of(spec.chip)
    report = _about(step, spec, chip, origin) | _flops(step, chip) | _bytes(step) | measured
    return report | ({"does_not_fit": refused} if spec.fastest else {})


def _first_that_fits(
    steps: list[PlannedStep], spec: PlanSpec, say: Callable[[str], None]
) -> tuple[PlannedStep, dict[str, Any], list[dict[str, Any]]]:
    """The first step that fits, or the last; what was measured of it, and those before it."""
    room, refused = usable(chip_of(spec.chip)), []
    for step in steps[:-1]:
        if (least := least_bytes(step)) > room:
            refused.append(_policy(step.stage) | {"at_least_bytes_per_device": least})
            continue
        measured = _measured(step, spec, say)
        if measured["fits"]:
            return step, measured, refused
        peak = {"peak_bytes_per_device": measured["peak_bytes_per_device"]}
        refused.append(_policy(step.stage) | peak)
    return steps[-1], _measured(steps[-1], spec, say), refused


def policies(stage: WanARStage, clip: Clip) -> list[WanARStage]:
    """The stage with less and less memory, and ever more that is computed again."""
    known = {1, stage.ffn_chunks if stage.ffn_chunks > 1 else 8}
    parts = sorted(n for n in known if stage.device_tokens(clip.chunks, clip.chunk_tokens) % n == 0)
    ways = [(remat, n) for remat in (False, True) for n in parts]
    return [dataclasses.replace(stage, remat=remat, ffn_chunks=n) for remat, n in ways]


def usable(chip: Chip) -> int:
    """Bytes that a program may have."""
    return chip.memory - RESERVED


def least_bytes(step: PlannedStep) -> int:
    """What a device holds for certain when the last layer is done: the state, and of every layer
    the input; without recomputation also what its three norms and its matrix products took."""
    model = step.model
    stream = jnp.dtype(model.stream_dtype).itemsize
    kept = stream * model.dim
    if not step.stage.remat:
        # Inputs of the linears, rotated queries and keys, values; q and output again for the text.
        taken = 9 * model.dim + (2 * model.ffn_dim if step.stage.ffn_chunks == 1 else 0)
        kept = (stream + 2 * 4) * model.dim + jnp.dtype(model.dtype).itemsize * taken
    tokens = step.stage.device_tokens(step.clip.chunks, step.clip.chunk_tokens)
    return sum(_state_bytes(step).values()) + model.layers * tokens * kept


def _policy(stage: WanARStage) -> dict[str, Any]:
    return {"remat": stage.remat, "ffn_parts": stage.ffn_chunks}


def _about(step: PlannedStep, spec: PlanSpec, chip: Chip, origin: str) -> dict[str, Any]:
    stage, clip = step.stage, step.clip
    return {
        "chip": spec.chip,
        "device": chip.name,
        "devices": stage.mesh.size,
        "mesh": dict(zip(AXES, stage.mesh.shape, strict=True)),
        "model": origin,
        "parameters": parameters(step.model),
        "latent_frames": clip.frames,
        "seconds_of_video": round((1 + 4 * (clip.frames - 1)) / 24, 2),
        "chunk": clip.chunk_frames,
        "size": list(clip.size),
        "batch": stage.batch,
        "accumulate": stage.loop.accumulate,
        "dtype": stage.dtype,
        "stream_dtype": stage.stream_dtype,
        "attention": stage.attention if stage.attention in NAMED else STAND_IN,
        **_policy(stage),
    }


def _flops(step: PlannedStep, chip: Chip) -> dict[str, Any]:
    """Of one update over all devices; `recomputed` comes on top of `flops_per_step`."""
    stage, clip, model = step.stage, step.clip, step.model
    sizes: Any = {"chunks": clip.chunks, "chunk_tokens": clip.chunk_tokens, "window": stage.window}
    work = clips_cost(model, batch=stage.batch, **sizes)
    forward = forward_flops(model, **sizes)
    parts = {k: 3 * stage.batch * x for k, x in dataclasses.asdict(forward).items()}
    again = stage.batch * forward.total if stage.remat else 0.0
    if stage.ffn_chunks > 1:  # the hidden values once more
        again += 2.0 * model.layers * work.tokens * model.dim * model.ffn_dim
    return {
        "tokens_per_step": work.tokens,
        "flops_per_step": work.flops,
        "flops": parts,
        "recomputed_flops_per_step": again,
        "least_seconds_per_step": (work.flops + again) / (stage.mesh.size * chip.flops),
    }


def _bytes(step: PlannedStep) -> dict[str, Any]:
    """Of one device, by what they are for, and of the sampler's cache of one video."""
    stage, clip, model = step.stage, step.clip, step.model
    tokens = stage.device_tokens(clip.chunks, clip.chunk_tokens)
    width, stream = (jnp.dtype(x).itemsize for x in (model.dtype, model.stream_dtype))
    rows = stage.batch // stage.loop.accumulate // stage.mesh.samples
    prompts = 2 * rows * clip.chunks // stage.mesh.sp
    layers = 1 if stage.remat else model.layers  # whose texts' keys and values are there at once
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
    """Bytes a device has of what stays from update to update, and of a batch."""
    shapes, specs = step.state()
    trained, trained_specs = shapes.groups["dit"], specs.groups["dit"]
    mesh = dict(zip(AXES, step.stage.mesh.shape, strict=True))
    batch = {k: P(*BATCH_SPECS[k][: x.ndim]) for k, x in step.batch().items()}
    return {
        "parameters": _held(trained.params, trained_specs.params, mesh),
        "average": _held(trained.ema, trained_specs.ema, mesh),
        "moments": _held(trained.opt_state, trained_specs.opt_state, mesh),
        "error_buffers": _held(shapes.loss_state, specs.loss_state, mesh),
        "batch": _held(step.batch(), batch, mesh),
    }


def _held(shapes: Any, specs: Any, mesh: dict[str, int]) -> int:
    def one(x: jax.ShapeDtypeStruct, spec: P) -> int:
        parts = math.prod(rules.parts_of(mesh, names) for names in spec)
        return x.size * x.dtype.itemsize // parts

    return sum(jax.tree.leaves(jax.tree.map(one, shapes, specs)))


def _measured(step: PlannedStep, spec: PlanSpec, say: Callable[[str], None]) -> dict[str, Any]:
    """What the compiler says, or nothing of it."""
    chip, stage = chip_of(spec.chip), step.stage
    held = {"device_bytes": chip.memory, "reserved_bytes": RESERVED}
    if not spec.compile:
        names = ("collective_bytes_per_step", "peak_bytes_per_device", "fits")
        return dict.fromkeys(names) | held
    policy = ", ".join(f"{k} {v}" for k, v in _policy(stage).items())
    say(f"Compiling the step for {stage.mesh.size} x {chip.name} ({policy}); about a minute.")
    found = plan_compile.compiled(
        {
            "stage": dataclasses.asdict(stage),
            "model": _plain(step.model),
            "clip": dataclasses.asdict(step.clip),
            "chip": spec.chip,
        }
    )
    sent = sum(kind["bytes"] for kind in found["collectives"].values())
    return {
        "collective_bytes_per_step": sent * stage.mesh.size,
        "collectives_per_device": found["collectives"],
        "peak_bytes_per_device": found["peak"],
        "temporary_bytes_per_device": found["temporary"],
        **held,
        "fits": found["peak"] <= usable(chip),
        "compile_seconds": {k: round(x, 1) for k, x in found["seconds"].items()},
    }


def _plain(model: DiTConfig) -> dict[str, Any]:
    """A model's settings with data types by name."""
    values = dataclasses.asdict(model)
    return values | {k: jnp.dtype(values[k]).name for k in ("dtype", "stream_dtype", "param_dtype")}


def _abstract(spec: MeshSpec) -> Any:
    return AbstractMesh(spec.shape, AXES, axis_types=(AxisType.Auto,) * 3)
