"""Sampling settings: `SampleSpec`, and the defaults that a checkpoint has for its own model."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

import jax

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.diffusion.solvers import check_levels
from longlive_jax.io.checkpoint import CheckpointWriter, read_manifest
from longlive_jax.models.wan.cache import CachePolicy
from longlive_jax.models.wan.packed_cache import KVFormat, Reader, Smoothing, Storage
from longlive_jax.quant.policy import QuantSpec
from longlive_jax.sampling.script import check_size
from longlive_jax.spec import UserError, build, check_types, with_renamed

MANIFEST_KEY = "sampling"
RENAMED_SETTINGS = {"chunk": "chunk_frames", "rope_offset": "shot_rope_offset"}
"""Names of settings in checkpoints of earlier versions -> current names."""
LOADED_WITH = frozenset({"dtype", "vae_dtype", "vae_device", "quant"})
"""Settings that apply when weights are loaded and cannot change after."""

LIMITS: dict[str, tuple[float, float]] = {
    "fps": (0.1, 1000),
    "chunk_frames": (1, 1024),
    "steps": (1, 1000),
    "shift": (1e-3, 1000),
    "guidance": (0, 1000),
    "window": (1, 4096),
    "global_sinks": (0, 4096),
    "shot_rope_offset": (0, 10**6),
    "ahead": (0, 64),
}
"""Smallest and largest values of numbers; there are 1000 noise levels, so more steps add none."""

Precision = Literal["auto", "float32", "bfloat16"]
SolverName = Literal["unipc", "euler", "sde"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """Sampling settings; the defaults are those of the released 5B model.

    Attributes:
      size: height and width in pixels of scripts without a size.
      fps: frames per second.
      chunk_frames: latent frames per chunk.
      solver: solver of the flow; "sde" adds noise between its steps and needs many of them.
      steps: model calls per chunk; 2 to 4 for a distilled model, 32 to 50 otherwise.
      shift: shift of the noise levels towards the noisy end.
      levels: noise level of each step, descending in (0, 1], as an adapter or a distilled model was
        trained with; None takes those of steps and shift.
      guidance: scale of classifier-free guidance; 1 is off and needs no negative prompts.
      negative_prompt: negative prompt of scripts without one.
      window: chunks in the attention window, the current one and all sinks included.
      global_sinks: number of first chunks of the video that stay in the window.
      shot_sinks: whether the first chunk of the current shot stays in the window.
      shot_rope_offset: latent frames added to temporal positions at every cut.
      clean_recache: whether a cut evicts all but the global sinks.
      relative_rope: whether temporal positions are counted from the start of the window.
      kv: storage of the window's keys and values: the model's dtype, or NVFP4 (4.5 bits per value).
      kv_smoothing: smoothing of NVFP4 keys; "reference" is what LongLive 2.0 ships (see
        `packed_cache`).
      kv_reader: reader of NVFP4 keys and values: "auto" dequantizes them layer by layer, "mosaic"
        is a kernel for Blackwell that reads them packed.
      cut_prefix: text that opens the prompt of the first chunk of a new shot.
      ahead: chunks in flight beyond the one a stream hands out. Steering takes effect that many
        chunks later; 0 reacts at once, without overlap.
      dtype: dtype of DiT and text encoder; "auto" is bfloat16 on accelerators, float32 on CPUs.
      vae_dtype: dtype of the VAE.
      quant: quantization of the DiT's matrices; policy "none" leaves them as in the checkpoint.
      vae_device: index of the VAE's own device; None shares the DiT's.
    """

    size: tuple[int, int] = (704, 1280)
    fps: float = 24.0
    chunk_frames: int = 8
    solver: SolverName = "unipc"
    steps: int = 4
    shift: float = 5.0
    levels: tuple[float, ...] | None = None
    guidance: float = 1.0
    negative_prompt: str = ""
    window: int = 4
    global_sinks: int = 1
    shot_sinks: bool = True
    shot_rope_offset: int = 8
    clean_recache: bool = False
    relative_rope: bool = False
    kv: Storage = "model"
    kv_smoothing: Smoothing = KVFormat().smoothing
    kv_reader: Reader = KVFormat().reader
    cut_prefix: str = CUT_PREFIX
    ahead: int = 1
    dtype: Precision = "auto"
    vae_dtype: Precision = "auto"
    vae_device: int | None = None
    quant: QuantSpec = dataclasses.field(default_factory=QuantSpec)

    def __post_init__(self) -> None:
        # 1. Types.
        if not isinstance(self.size, tuple | list) or len(self.size) != 2:
            raise UserError(f"size must be (height, width) in pixels, got {self.size!r:.80}")
        check_types(self)
        # 2. Ranges.
        check_size(*self.size)
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if value < low:
                raise UserError(f"{name} must be >= {low}, got {value}")
            if value > high:
                raise UserError(f"{name} must be <= {high}, got {value}")
        if self.levels is not None:
            try:
                check_levels(self.levels, self.steps)
            except ValueError as error:
                raise UserError(f"{error}; levels=None takes those of steps and shift") from error
        if self.vae_device is not None and not 0 <= self.vae_device < jax.device_count():
            raise UserError(
                f"vae_device must be one of devices 0 to {jax.device_count() - 1}, got "
                f"{self.vae_device}"
            )
        try:
            _ = self.policy
        except ValueError as error:  # a window too small for its sinks
            raise UserError(str(error)) from error

    @property
    def policy(self) -> CachePolicy:
        """Which chunks the cache keeps, and in which format."""
        return CachePolicy(
            window=self.window,
            global_sinks=self.global_sinks,
            shot_sinks=self.shot_sinks,
            clean_recache=self.clean_recache,
            relative_rope=self.relative_rope,
            format=KVFormat(self.kv, smoothing=self.kv_smoothing, reader=self.kv_reader),
        )


def precision(choice: Precision) -> str:
    """The dtype that a setting selects on this machine, by name."""
    if choice != "auto":
        return choice
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with `changes`; levels do not outlast a change of the steps or the shift."""
    result = {**settings, **changes}
    defaults = {field.name: field.default for field in dataclasses.fields(SampleSpec)}
    for name in ("steps", "shift"):
        if result.get(name, defaults[name]) != settings.get(name, defaults[name]):
            result["levels"] = changes.get("levels")
    return result


def checkpoint_settings(folder: str | os.PathLike) -> dict[str, Any]:
    """The fields of `SampleSpec` that a checkpoint stores as its own defaults."""
    return with_renamed(read_manifest(folder).get(MANIFEST_KEY, {}), RENAMED_SETTINGS)


def spec_for(folder: str | os.PathLike, changes: Mapping[str, Any] | None = None) -> SampleSpec:
    """The checkpoint's own settings, overridden by `changes`; UserError as from `build`."""
    own = checkpoint_settings(folder)
    return build(SampleSpec, changed(own, changes or {}), path="sample")


def save_settings(folder: str | os.PathLike, settings: Mapping[str, Any]) -> None:
    """Writes `settings` (fields of `SampleSpec`) to a checkpoint directory as its defaults."""
    build(SampleSpec, settings, path="sample")
    with CheckpointWriter(folder) as writer:
        writer.manifest[MANIFEST_KEY] = dict(settings)
        writer.commit()
