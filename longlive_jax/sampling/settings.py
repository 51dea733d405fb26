"""How videos are sampled: `SampleSpec`, and the defaults a checkpoint carries for its own model."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

import jax

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.io.checkpoint import CheckpointWriter, read_manifest
from longlive_jax.models.wan.cache import CachePolicy
from longlive_jax.models.wan.packed_cache import KVFormat, Reader, Smoothing, Storage
from longlive_jax.quant.policy import QuantSpec
from longlive_jax.sampling.script import check_size
from longlive_jax.spec import UserError, build, with_renamed

MANIFEST_KEY = "sampling"
RENAMED = {"chunk": "chunk_frames", "rope_offset": "shot_rope_offset"}
"""Settings in checkpoints of earlier versions, and their names today."""

Precision = Literal["auto", "float32", "bfloat16"]
Solver = Literal["unipc", "euler", "sde"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """What is chosen when sampling; the defaults are those of the released 5B model.

    Attributes:
      size: height and width in pixels, where the script does not say.
      fps: frames a second.
      chunk_frames: latent frames generated together.
      solver: of the flow; "sde" adds noise between its steps and wants many of them.
      steps: model calls per chunk; 2 to 4 for a distilled model, 32 to 50 otherwise.
      shift: of the noise levels towards the noisy end.
      guidance: 1 is off, and then nothing negative is computed or stored.
      negative_prompt: where the script does not say.
      window: chunks that attention sees, the current one and all sinks included.
      global_sinks: so many first chunks of the video stay in the window.
      shot_sinks: the first chunk of the current shot stays in the window.
      shot_rope_offset: latent frames added to temporal positions at every cut.
      clean_recache: at a cut, only the global sinks are kept.
      relative_rope: temporal positions are counted from the start of the window.
      kv: how the window's keys and values are stored: in the model's dtype, or in NVFP4 at 4.5 bits
        a number.
      kv_smoothing: of NVFP4 keys; "reference" is what LongLive 2.0 ships, see `packed_cache`.
      kv_reader: of NVFP4 keys and values: "auto" unpacks them a layer at a time, "mosaic" is a
        kernel that reads them packed, for Blackwell.
      cut_prefix: opens the prompt of the first chunk of a new shot.
      ahead: chunks computed ahead of the one a stream hands out. Prompts and cuts given to a stream
        take effect that many chunks later; 0 reacts at once and overlaps nothing.
      dtype: of DiT and text encoder; "auto" is bfloat16 on accelerators and float32 on CPUs.
      vae_dtype: of the VAE.
      quant: of the DiT's matrices; policy "none" takes them as the checkpoint has them.
      vae_device: index of a device of its own for the VAE, if there is more than one.
    """

    size: tuple[int, int] = (704, 1280)
    fps: float = 24.0
    chunk_frames: int = 8
    solver: Solver = "unipc"
    steps: int = 4
    shift: float = 5.0
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
        check_size(*self.size)
        least = {
            "fps": 0.1,
            "chunk_frames": 1,
            "steps": 1,
            "shift": 1e-3,
            "ahead": 0,
            "shot_rope_offset": 0,
        }
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {bound}")
        if self.vae_device is not None and not 0 <= self.vae_device < jax.device_count():
            raise UserError(
                f"vae_device is {self.vae_device}; this machine has devices 0 to "
                f"{jax.device_count() - 1}"
            )
        _ = self.policy  # a window too small for its sinks is found here

    @property
    def policy(self) -> CachePolicy:
        """What the cache keeps."""
        return CachePolicy(
            window=self.window,
            global_sinks=self.global_sinks,
            shot_sinks=self.shot_sinks,
            clean_recache=self.clean_recache,
            relative_rope=self.relative_rope,
            format=KVFormat(self.kv, smoothing=self.kv_smoothing, reader=self.kv_reader),
        )


def precision(choice: Precision) -> str:
    """The name of the type that a choice means on this machine."""
    if choice != "auto":
        return choice
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def spec_for(folder: str | os.PathLike, chosen: Mapping[str, Any] | None = None) -> SampleSpec:
    """The checkpoint's own settings, with `chosen` ones in place; UserError as from `build`."""
    own = with_renamed(read_manifest(folder).get(MANIFEST_KEY, {}), RENAMED)
    return build(SampleSpec, {**own, **(chosen or {})}, path="sample")


def save_settings(folder: str | os.PathLike, settings: Mapping[str, Any]) -> None:
    """Makes `settings` (fields of `SampleSpec`) the defaults of a checkpoint directory."""
    build(SampleSpec, settings, path="sample")
    with CheckpointWriter(folder) as writer:
        writer.manifest[MANIFEST_KEY] = dict(settings)
        writer.commit()
