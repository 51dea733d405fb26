"""`longlive plan --config=configs/ar_5b.py --chip=gb200 --mesh=data=8,sp=4 --frames=384 [--json]`.

Says what training would need on GPUs that are not here: parameters, operations, traffic, and from a
compile of the real step the peak memory of a device and whether it fits. For stage `clips`. The
checkpoint and the clips of the config need not be there: without the checkpoint the model is
Wan2.2-TI2V-5B; without the clips a clip has a chunk for every row of the config's error buffers, if
--frames does not tell. With `--mesh` the config's batch changes as the ways it is split do: devices
that share a sequence have as many clips as before. Error buffers follow the mesh and the clips'
length.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from longlive_jax.cli.app import Parser, take_config
from longlive_jax.cli.meshes import mesh_of
from longlive_jax.spec import UserError, build

GIB = 2**30


def main(argv: Sequence[str]) -> int:
    """Plans the stage that the config names."""
    config, rest = take_config(argv)
    args = _parser().parse_args(rest)
    from longlive_jax.planning.plan import PlanSpec, clip_of, moved, plan
    from longlive_jax.training.stages.wan_ar import WanARStage

    settings = config.to_dict()
    name = settings.pop("stage", None)
    if name != "clips":
        raise UserError(f"config.stage is {name!r}; plans are made for 'clips'")
    stage = build(WanARStage, settings)
    clip, origin = clip_of(stage)
    asked = {"chip": args.chip, "fastest": args.fastest, "compile": not args.no_compile}
    size = None if args.size is None else _numbers("--size", args.size)
    options = {"frames": args.frames, "chunk_frames": args.chunk, "size": size}
    options = {name: value for name, value in options.items() if value is not None}
    spec = build(PlanSpec, dataclasses.asdict(clip) | asked | options, path="plan")
    stage = moved(stage, stage.mesh if args.mesh is None else mesh_of(args.mesh), spec.clip)
    report = plan(stage, spec, say=lambda text: print(text, file=sys.stderr))
    report["precision"] = _precision(stage)
    report["clips_from"] = ", ".join(FLAGS.get(name, f"--{name}") for name in options) or origin
    print(json.dumps(report, indent=1) if args.json else table(report))
    return 0


FLAGS = {"chunk_frames": "--chunk"}
"""Options of the command line whose names are not their settings'."""


def _precision(stage: Any) -> str:
    """What of the planned model is quantized, in one line."""
    from flax import nnx

    from longlive_jax.models.params import abstract
    from longlive_jax.models.wan import DiT
    from longlive_jax.planning.plan import model_of
    from longlive_jax.quant.policy import named

    model, _ = model_of(stage)
    _, shapes = abstract(lambda: DiT(model, rngs=nnx.Rngs(0)))
    return named(stage.quant.policy).describe(shapes)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(word) for word in text.split("x")]
    except ValueError:
        raise UserError(f"{option}: expected numbers and 'x', got {text!r}") from None


def table(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    state = report["state_bytes_per_device"]
    kept = report["activation_bytes_per_device"]
    rows = [
        ("devices", f"{report['devices']} x {report['device']}, {_axes(report['mesh'])}"),
        ("model", f"{report['model']}, {report['parameters'] / 1e9:.2f} B parameters"),
        ("precision", report["precision"]),
        ("attention", _attention(report)),
        ("clips", _clips(report)),
        ("recomputed", _policy(report)),
        ("operations", _operations(report)),
        ("sent", _sent(report)),
        ("state", _amounts(state)),
        ("activations", _amounts(kept)),
        ("sampler's cache", f"{report['kv_cache_bytes'] / GIB:.2f} GiB a video"),
        ("peak", verdict(report)),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def verdict(report: dict[str, Any]) -> str:
    """The peak of a device, and `fits` or by how much it does not."""
    there, held = report["device_bytes"], report["reserved_bytes"]
    room = f"{(there - held) / GIB:.1f} GiB of {there / GIB:.1f}, {held / GIB:.0f} held back"
    if report["fits"] is None:
        return f"not compiled; a program may have {room}"
    spare = (there - held - report["peak_bytes_per_device"]) / GIB
    said = f"fits, {spare:.1f} GiB to spare" if spare >= 0 else f"does not fit by {-spare:.1f} GiB"
    return f"{report['peak_bytes_per_device'] / GIB:.1f} GiB a device: {said} ({room})"


def _attention(report: dict[str, Any]) -> str:
    from longlive_jax.planning.step import STAND_IN

    if report["attention"] != STAND_IN:
        return report["attention"]
    return f"{STAND_IN}; training takes xla unless told mosaic: plan --config.attention=xla"


def _clips(report: dict[str, Any]) -> str:
    height, width, channels = report["size"]
    return (
        f"{report['batch']} of {report['latent_frames']} x {height}x{width}x{channels} "
        f"({report['seconds_of_video']:.0f} s) in chunks of {report['chunk']}, "
        f"{report['tokens_per_step']:,} tokens ({report['clips_from']})"
    )


def _policy(report: dict[str, Any]) -> str:
    layers = "every layer" if report["remat"] else "nothing"
    parts = report["ffn_parts"]
    return layers + (f", feed-forward in {parts} parts of the tokens" if parts > 1 else "")


def _operations(report: dict[str, Any]) -> str:
    parts = ", ".join(f"{k} {x / 1e15:.2f}" for k, x in report["flops"].items())
    again = report["recomputed_flops_per_step"] / 1e15
    return (
        f"{report['flops_per_step'] / 1e15:.2f} PFLOP a step ({parts}), {again:.2f} more "
        f"recomputed; at least {report['least_seconds_per_step']:.2f} s at the chips' full rate"
    )


def _sent(report: dict[str, Any]) -> str:
    if report["collective_bytes_per_step"] is None:
        return "not compiled"
    kinds = report["collectives_per_device"]
    parts = ", ".join(
        f"{name} {kind['bytes'] / GIB:.2f} ({kind['count']})"
        for name, kind in kinds.items()
        if kind["count"]
    )
    whole = sum(kind["bytes"] for kind in kinds.values()) / GIB
    return f"{whole:.1f} GiB a device and step" + (f": {parts}" if parts else "")


def _amounts(values: dict[str, int]) -> str:
    whole = sum(values.values()) / GIB
    named = {k.replace("_", " "): x / GIB for k, x in values.items() if x}
    return f"{whole:.2f} GiB a device: " + ", ".join(f"{k} {x:.2f}" for k, x in named.items())


def _axes(mesh: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in mesh.items())


def _parser() -> Parser:
    parser = Parser("plan", __doc__ or "")
    parser.add_argument("--chip", required=True, help="gb200, b200, h200 or h100")
    parser.add_argument("--mesh", help="devices by axis, as data=8,sp=4; default: the config's")
    parser.add_argument("--frames", type=int, help="latent frames of a clip; default: the run's")
    parser.add_argument("--chunk", type=int, help="latent frames of a chunk; default: the run's")
    parser.add_argument("--size", help="HEIGHTxWIDTHxCHANNELS of a latent; default: the run's")
    parser.add_argument(
        "--fastest", action="store_true", help="find the fastest way to recompute that fits"
    )
    parser.add_argument("--no-compile", action="store_true", help="only what needs no compiler")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    return parser
