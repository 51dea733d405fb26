"""A small distillation on encoded prompts, as a command and as a task."""

import jax

from longlive_jax.cli.app import run
from longlive_jax.cli.recipes import take_config
from longlive_jax.parallel.mesh import make_mesh
from longlive_jax.spec import build
from longlive_jax.training.stages.wan_dmd import WanDMDStage

SETTINGS = (
    "batch=2", "dtype=float32", "stream_dtype=float32", "ffn_chunks=1",
    "lora.rank=4", "rollout.steps=2", "rollout.chunks=2", "chunks_per_shot=1",
    "generator_every=2", "optim.lr=1e-2", "critic_optim.lr=1e-2", "save_dtype=float32",
    "share_backbones=true", "preview.prompts=()", "mesh.data=1", "mesh.fsdp=1",
    "loop.steps=4", "loop.log_every=1", "loop.save_every=2",
)  # fmt: skip
"""Two chunks in two shots; the generator is updated in every second step."""


def encode_prompts(checkpoint, out, *options):
    """Encodes scripts of one shot each; returns the folder."""
    scripts = out.with_suffix(".txt")
    scripts.write_text("a cat runs\na dog sleeps\na cat sleeps\n")
    command = ["data", "encode", f"--scripts={scripts}", f"--checkpoint={checkpoint}"]
    assert run([*command, f"--out={out}", *options]) == 0
    return out


def command(checkpoint, prompts, workdir, *changes):
    """Arguments of `longlive train`."""
    paths = (f"checkpoint={checkpoint}", f"teacher={checkpoint}", f"prompts={prompts}")
    overrides = [f"--config.{change}" for change in (*SETTINGS, *paths, *changes)]
    outputs = [f"--workdir={workdir}", f"--out={workdir}-out"]
    return ["train", "--config=configs/dmd_5b.py:t2v", *overrides, *outputs]


def stage(checkpoint, prompts, *changes):
    """The stage that `command` trains."""
    arguments = command(checkpoint, prompts, "unused", *changes)[1:]
    settings = take_config(arguments, verb="train")[0].to_dict()
    settings.pop("stage")
    return build(WanDMDStage, settings)


def task(checkpoint, prompts, folder, *changes):
    """The stage and its task."""
    own = stage(checkpoint, prompts, *changes)
    mesh = make_mesh(own.mesh, jax.devices()[: own.mesh.size])
    return own, own.task(folder / "out", folder / "work", mesh)
