"""`longlive plan --config=ar_5b:64s --chip=gb200 --mesh=data=8,sp=4 --frames=384 [--json]`.

Estimates what training needs on GPUs that are not present: parameters, compute, communication
volume and, from a compile of the real step, peak memory per device and whether it fits. Works for
stage `clips`. The config's checkpoint and clips need not exist: without the checkpoint the model is
Wan2.2-TI2V-5B; without the clips and --frames, a clip has one chunk per row of the config's error
buffers. With --mesh the number of clips per sp group stays that of the config, so the batch scales
with data * fsdp. Error buffers follow the mesh and the length of the clips.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from longlive_jax.cli.app import Parser
from longlive_jax.cli.meshes import parse_mesh
from longlive_jax.cli.options import add_config_option
from longlive_jax.cli.recipes import take_config
from longlive_jax.spec import UserError, build

GIB = 2**30
FLAGS = {"chunk_frames": "--chunk"}
"""Command-line options whose name differs from their setting."""
LABELS = {
    "average": "EMA",
    "moments": "optimizer moments",
    "keys_and_values_of_a_layer": "K and V of one layer",
    "keys_and_values_of_texts": "text K and V",
}
"""Names in the table of keys in the report; other keys are shown as they are."""


def main(argv: Sequence[str]) -> int:
    """Estimates the stage that the config names, and prints a table or JSON."""
    # 1. Read the config and the options.
    parser = _parser()
    add_config_option(parser)
    parser.closing = lambda: "Settings of the recipe: `longlive settings clips`, or of RECIPE."
    config, rest = take_config(argv, verb="train")
    args = parser.parse_args(rest)
    from longlive_jax.planning.plan import PlanSpec, clip_of, estimate, scale_to_mesh
    from longlive_jax.training.stages.wan_ar import WanARStage

    settings = config.to_dict()
    name = settings.pop("stage", None)
    if name != "clips":
        raise UserError(f"config.stage must be 'clips' for a plan, got {name!r}")
    stage = build(WanARStage, settings)
    clip, origin = clip_of(stage)
    request = {"chip": args.chip, "fastest": args.fastest, "compile": not args.no_compile}
    size = None if args.size is None else _numbers("--size", args.size)
    options = {"frames": args.frames, "chunk_frames": args.chunk, "size": size}
    options = {name: value for name, value in options.items() if value is not None}
    spec = build(PlanSpec, dataclasses.asdict(clip) | request | options, path="plan")
    # 2. Estimate.
    mesh = stage.mesh if args.mesh is None else parse_mesh(args.mesh)
    stage = scale_to_mesh(stage, mesh, spec.clip)
    report = estimate(stage, spec, log=lambda text: print(text, file=sys.stderr))
    report["precision"] = _precision(stage)
    report["clips_from"] = ", ".join(FLAGS.get(name, f"--{name}") for name in options) or origin
    print(json.dumps(report, indent=1) if args.json else table(report))
    return 0


def _precision(stage: Any) -> str:
    """Which weights of the planned model are quantized, in one line."""
    from flax import nnx

    from longlive_jax.models.params import abstract
    from longlive_jax.models.wan import DiT
    from longlive_jax.planning.plan import model_of
    from longlive_jax.quant.policy import named

    model, _ = model_of(stage)
    _, shapes = abstract(lambda: DiT(model, rngs=nnx.Rngs(0)))
    return named(stage.quant.policy).describe(shapes)


def _numbers(option: str, text: str) -> list[int]:
    """Integers with "x" between them; UserError for anything else."""
    try:
        return [int(word) for word in text.split("x")]
    except ValueError:
        raise UserError(f"{option}: expected numbers separated by 'x', got {text!r}") from None


def table(report: dict[str, Any]) -> str:
    """The report as a text table."""
    state = report["state_bytes_per_device"]
    activations = report["activation_bytes_per_device"]
    rows = [
        ("devices", f"{report['devices']} x {report['device']}, {_mesh(report['mesh'])}"),
        ("model", f"{report['model']}, {report['parameters'] / 1e9:.2f} B parameters"),
        ("precision", report["precision"]),
        ("attention", report["attention"]),
        ("batch", _batch(report)),
        ("recomputation", _remat_policy(report)),
        ("compute", _compute(report)),
        ("communication", _communication(report)),
        ("train state", _sizes(state)),
        ("activations", _sizes(activations)),
        ("sampling KV cache", f"{report['kv_cache_bytes'] / GIB:.2f} GiB per video"),
        ("peak memory", verdict(report)),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def verdict(report: dict[str, Any]) -> str:
    """Peak memory of a device, and by how much it fits or does not."""
    total, reserved = report["device_bytes"], report["reserved_bytes"]
    limit = (
        f"{(total - reserved) / GIB:.1f} of {total / GIB:.1f} GiB usable, "
        f"{reserved / GIB:.0f} GiB reserved"
    )
    if report["fits"] is None:
        return f"not compiled; {limit}"
    spare = (total - reserved - report["peak_bytes_per_device"]) / GIB
    result = (
        f"fits, {spare:.1f} GiB to spare" if spare >= 0 else f"does not fit by {-spare:.1f} GiB"
    )
    return f"{report['peak_bytes_per_device'] / GIB:.1f} GiB per device: {result} ({limit})"


def _batch(report: dict[str, Any]) -> str:
    height, width, channels = report["size"]
    accumulate = report["accumulate"]
    microbatches = f", gradient accumulation over {accumulate} microbatches" * (accumulate > 1)
    return (
        f"{report['batch']} clips of {report['latent_frames']} x {height}x{width}x{channels} "
        f"({report['seconds_of_video']:.0f} s) in chunks of {report['chunk']}, "
        f"{report['tokens_per_step']:,} tokens{microbatches} ({report['clips_from']})"
    )


REMAT = {
    "none": "none",
    "attention_saved": "every layer except attention",
    "everything": "every layer",
}
"""What every rematerialization policy recomputes."""


def _remat_policy(report: dict[str, Any]) -> str:
    layers = REMAT[report["remat"]]
    chunks = report["ffn_parts"]
    return layers + (f", feed-forward in {chunks} chunks of the tokens" if chunks > 1 else "")


def _compute(report: dict[str, Any]) -> str:
    kinds = ", ".join(f"{k} {x / 1e15:.2f}" for k, x in report["flops"].items())
    recomputed = report["recomputed_flops_per_step"] / 1e15
    return (
        f"{report['flops_per_step'] / 1e15:.2f} PFLOP per step ({kinds}) and {recomputed:.2f} "
        f"recomputed; at least {report['least_seconds_per_step']:.2f} s at peak bf16 FLOP/s"
    )


def _communication(report: dict[str, Any]) -> str:
    if report["collective_bytes_per_step"] is None:
        return "not compiled"
    kinds = report["collectives_per_device"]
    volumes = ", ".join(
        f"{name} {kind['bytes'] / GIB:.2f} ({kind['count']})"
        for name, kind in kinds.items()
        if kind["count"]
    )
    total = sum(kind["bytes"] for kind in kinds.values()) / GIB
    return f"{total:.1f} GiB sent per device and step" + (f": {volumes}" if volumes else "")


def _sizes(values: dict[str, int]) -> str:
    """Their sum and all that are not zero, in GiB."""
    total = sum(values.values()) / GIB
    labels = {k: LABELS.get(k, k.replace("_", " ")) for k in values}
    sizes = ", ".join(f"{labels[k]} {x / GIB:.2f}" for k, x in values.items() if x)
    return f"{total:.2f} GiB per device: {sizes}"


def _mesh(axes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in axes.items())


def _parser() -> Parser:
    parser = Parser("plan", __doc__ or "")
    parser.add_argument("--chip", required=True, help="gb200, b200, h200 or h100")
    parser.add_argument("--mesh", help="devices by axis, as data=8,sp=4; default: the config's")
    parser.add_argument("--frames", type=int, help="latent frames per clip; default: the run's")
    parser.add_argument("--chunk", type=int, help="latent frames per chunk; default: the run's")
    parser.add_argument("--size", help="HEIGHTxWIDTHxCHANNELS of a latent; default: the run's")
    parser.add_argument(
        "--fastest", action="store_true", help="use the fastest recomputation policy that fits"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="skip peak memory and communication volume"
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")
    return parser
