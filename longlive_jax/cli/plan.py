"""`longlive plan --config=ar_5b:64s --chip=gb200 --mesh=data=8,sp=4 --frames=384 [--json]`.

Estimates what training needs on GPUs that are not present: parameters, compute, communication
volume and, from a compile of the real step, peak memory per device and whether it fits. Works for
stages `clips` and `dmd`. The config's checkpoint and clips need not exist: without the checkpoint
the model is Wan2.2-TI2V-5B; without the clips and --frames, a clip has one chunk per row of the
config's error buffers. With --mesh the number of clips per sp group stays that of the config, so
the batch scales with data * fsdp. Error buffers follow the mesh and the length of the clips. For
stage `dmd` memory and communication of both updates are estimated, without --mesh on one device.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from longlive_jax.cli import plan_tables
from longlive_jax.cli.app import Parser
from longlive_jax.cli.meshes import parse_mesh
from longlive_jax.cli.options import add_config_option
from longlive_jax.cli.recipes import take_config
from longlive_jax.spec import UserError, build

FLAGS = {"chunk_frames": "--chunk"}
"""Command-line options whose name differs from their setting."""
STAGES = ("clips", "dmd")
"""Stages that can be planned."""


def main(argv: Sequence[str]) -> int:
    """Estimates the stage that the config names, and prints a table or JSON."""
    # 1. Read the config and the options.
    parser = _parser()
    add_config_option(parser)
    parser.closing = lambda: "Settings of the recipe: `longlive settings RECIPE`, or of its stage."
    config, rest = take_config(argv, verb="train")
    args = parser.parse_args(rest)
    settings = config.to_dict()
    name = settings.pop("stage", None)
    if name not in STAGES:
        raise UserError(f"config.stage must be 'clips' or 'dmd' for a plan, got {name!r}")
    # 2. Estimate.
    if name == "dmd":
        report = _distillation(settings, args)
        text = plan_tables.distillation_table
    else:
        report, text = _clips(settings, args), plan_tables.table
    print(json.dumps(report, indent=1) if args.json else text(report))
    return 0


def _clips(settings: dict[str, Any], args: Any) -> dict[str, Any]:
    """The report on stage `clips`."""
    from longlive_jax.planning.plan import clip_of, estimate, scale_to_mesh
    from longlive_jax.training.stages.wan_ar import WanARStage

    stage = build(WanARStage, settings)
    spec, origin = _spec(args, *clip_of(stage))
    mesh = stage.mesh if args.mesh is None else parse_mesh(args.mesh)
    stage = scale_to_mesh(stage, mesh, spec.clip)
    report = estimate(stage, spec, log=_log)
    return report | {"precision": _precision(stage), "clips_from": origin}


def _distillation(settings: dict[str, Any], args: Any) -> dict[str, Any]:
    """The report on stage `dmd`."""
    from longlive_jax.parallel.mesh import MeshSpec
    from longlive_jax.planning.distillation import estimate_distillation, on_mesh, video_of
    from longlive_jax.training.stages.wan_dmd import WanDMDStage

    if args.fastest:
        raise UserError("--fastest is for stage 'clips'; set config.remat and config.ffn_chunks")
    stage = build(WanDMDStage, settings)
    spec, origin = _spec(args, *video_of(stage))
    stage = on_mesh(stage, MeshSpec() if args.mesh is None else parse_mesh(args.mesh))
    return estimate_distillation(stage, spec, log=_log) | {"videos_from": origin}


def _spec(args: Any, clip: Any, origin: str) -> tuple[Any, str]:
    """The `PlanSpec` of these options for a clip or video, and where its size comes from."""
    from longlive_jax.planning.plan import PlanSpec

    request = {"chip": args.chip, "fastest": args.fastest, "compile": not args.no_compile}
    size = None if args.size is None else _numbers("--size", args.size)
    options = {"frames": args.frames, "chunk_frames": args.chunk, "size": size}
    options = {name: value for name, value in options.items() if value is not None}
    spec = build(PlanSpec, dataclasses.asdict(clip) | request | options, path="plan")
    return spec, ", ".join(FLAGS.get(name, f"--{name}") for name in options) or origin


def _log(text: str) -> None:
    print(text, file=sys.stderr)


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


def _parser() -> Parser:
    parser = Parser("plan", __doc__ or "")
    parser.add_argument("--chip", required=True, help="gb200, b200, h200, h100, l40s or rtx4090")
    parser.add_argument(
        "--mesh", help="devices by axis, as data=8,sp=4; default: the config's (dmd: 1)"
    )
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
