"""VAE encoding cost of each device of a mesh: with halos, with exchanged tails, and unsharded."""

import dataclasses
from typing import Any

from longlive_jax.models.vae import VAEConfig
from longlive_jax.models.vae.sharded import (
    encoder_flops,
    flops_per_device,
    num_frame_groups,
    plan_vae_shards,
)
from longlive_jax.parallel.halo import halo_windows


@dataclasses.dataclass(frozen=True)
class EncodeCostSpec:
    """Clips to encode and the devices to encode them on.

    Attributes:
      latents: lengths of the clips, in latent frames.
      sp: devices that share a clip.
      size: height and width of a clip in pixels.
      model: settings of the VAE.
    """

    latents: tuple[int, ...] = (96, 192, 384)
    sp: int = 4
    size: tuple[int, int] = (704, 1280)
    model: VAEConfig = dataclasses.field(default_factory=VAEConfig)

    def __post_init__(self) -> None:
        if self.sp < 1 or any(count < 1 for count in self.latents):
            raise ValueError(f"sp and frames must be >= 1, got {self.sp} and {self.latents}")
        if any(side < 1 or side % self.model.spatial_stride for side in self.size):
            raise ValueError(
                f"both sides of size must be multiples of {self.model.spatial_stride}, "
                f"got {self.size}"
            )


def encode_cost(spec: EncodeCostSpec) -> dict[str, Any]:
    """Raw frames and TFLOP per device, by clip length; counted, nothing is run.

    Devices of a mesh run in step, so all take as long as the busiest one, whose numbers these are;
    `halo_by_device` has the windows as the reference cuts them.

    Raises ValueError if the latents of a clip do not split over `sp`.
    """
    work = encoder_flops(spec.model, spec.size)
    return {
        "sp": spec.sp,
        "size": list(spec.size),
        "tflop_per_latent": _tera(work.group),
        "clips": {str(latents): _clip(spec, latents) for latents in spec.latents},
    }


def _clip(spec: EncodeCostSpec, latents: int) -> dict[str, Any]:
    """Cost of one clip length by method."""
    cfg, temporal_stride, size = spec.model, spec.model.temporal_stride, spec.size
    work = encoder_flops(cfg, size)
    # 1. Shard the clip by every method that it is long enough for.
    default = plan_vae_shards(cfg, latents, spec.sp).method
    plans = {"halo": plan_vae_shards(cfg, latents, spec.sp, "halo")}
    if latents >= 2 * spec.sp:
        plans["tails"] = plan_vae_shards(cfg, latents, spec.sp, "tails")
    # 2. Count frames and operations.
    ref = halo_windows(latents, spec.sp, halo=plans["halo"].halo, temporal_stride=temporal_stride)
    return {
        "halo_latents": plans["halo"].halo,
        "raw_frames": {
            name: 1 + temporal_stride * num_frame_groups(plan) for name, plan in plans.items()
        },
        "raw_frames_own": temporal_stride * latents // spec.sp,
        "raw_frames_whole": cfg.num_raw_frames(latents),
        "tflop": {name: _tera(flops_per_device(plan, cfg, size)) for name, plan in plans.items()},
        "tflop_whole": _tera(work.leading + (latents - 1) * work.group),
        "halo_by_device": {
            "raw_frames": [w.frames for w in ref],
            "tflop": [_tera(work.leading + w.frames // temporal_stride * work.group) for w in ref],
        },
        "default": default,
    }


def _tera(flops: float) -> float:
    """FLOPs as TFLOP, rounded."""
    return round(flops / 1e12, 2)


def cost_table(report: dict[str, Any]) -> str:
    """The report as a text table."""
    height, width = report["size"]
    lines = [
        f"VAE encoding of {width}x{height}, per device of {report['sp']} "
        f"({report['tflop_per_latent']} TFLOP per latent)",
        f"{'latents':>8} {'method':>8} {'raw frames':>11} {'TFLOP':>9} {'of clip':>9}",
    ]
    for latents, clip in report["clips"].items():
        for name, frames in clip["raw_frames"].items():
            share = clip["tflop"][name] / clip["tflop_whole"]
            mark = "  default" if name == clip["default"] else ""
            lines.append(
                f"{latents:>8} {name:>8} {frames:>11} {clip['tflop'][name]:>9.1f} {share:>9.0%}"
                + mark
            )
    return "\n".join(lines)
