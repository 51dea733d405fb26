"""What encoding a clip over a mesh costs each device: with halos, with exchanged tails, whole."""

import dataclasses
from typing import Any

from longlive_jax.models.vae import VAEConfig
from longlive_jax.models.vae.sharded import flops_per_device, groups_encoded, sharing, work_of
from longlive_jax.parallel.halo import windows


@dataclasses.dataclass(frozen=True)
class EncodeCostSpec:
    """Clips of `latents` latents and `size` (height, width) pixels over `sp` devices."""

    latents: tuple[int, ...] = (96, 192, 384)
    sp: int = 4
    size: tuple[int, int] = (704, 1280)
    model: VAEConfig = dataclasses.field(default_factory=VAEConfig)

    def __post_init__(self) -> None:
        if self.sp < 1 or any(count < 1 for count in self.latents):
            raise ValueError(f"sp is {self.sp}, frames {self.latents}; give at least 1")
        if any(side < 1 or side % self.model.spatial_stride for side in self.size):
            raise ValueError(
                f"size is {self.size}; both sides must divide by {self.model.spatial_stride}"
            )


def encode_cost(spec: EncodeCostSpec) -> dict[str, Any]:
    """Raw frames and TFLOP a device, by length of clip; counted, nothing is run.

    Over a mesh devices run in step and all take as long as the busiest, whose numbers are given;
    `halo_by_device` has the windows as the reference cuts them. Raises ValueError if latents do not
    split over sp.
    """
    work = work_of(spec.model, spec.size)
    return {
        "sp": spec.sp,
        "size": list(spec.size),
        "tflop_per_latent": _tera(work.group),
        "clips": {str(latents): _clip(spec, latents) for latents in spec.latents},
    }


def _clip(spec: EncodeCostSpec, latents: int) -> dict[str, Any]:
    cfg, temporal_stride, size = spec.model, spec.model.temporal_stride, spec.size
    work = work_of(cfg, size)
    default = sharing(cfg, latents, spec.sp).method
    ways = {"halo": sharing(cfg, latents, spec.sp, "halo")}
    if latents >= 2 * spec.sp:
        ways["tails"] = sharing(cfg, latents, spec.sp, "tails")
    cut = windows(latents, spec.sp, halo=ways["halo"].halo, temporal_stride=temporal_stride)
    return {
        "halo_latents": ways["halo"].halo,
        "raw_frames": {
            name: 1 + temporal_stride * groups_encoded(way) for name, way in ways.items()
        },
        "raw_frames_own": temporal_stride * latents // spec.sp,
        "raw_frames_whole": cfg.num_raw_frames(latents),
        "tflop": {name: _tera(flops_per_device(way, cfg, size)) for name, way in ways.items()},
        "tflop_whole": _tera(work.leading + (latents - 1) * work.group),
        "halo_by_device": {
            "raw_frames": [w.frames for w in cut],
            "tflop": [_tera(work.leading + w.frames // temporal_stride * work.group) for w in cut],
        },
        "default": default,
    }


def _tera(flops: float) -> float:
    return round(flops / 1e12, 2)


def table(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    height, width = report["size"]
    lines = [
        f"VAE encoding of {width}x{height}, each of {report['sp']} devices "
        f"({report['tflop_per_latent']} TFLOP a latent)",
        f"{'latents':>8} {'method':>8} {'raw frames':>11} {'TFLOP':>9} {'of whole':>9}",
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
