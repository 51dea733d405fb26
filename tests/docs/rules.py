"""What the tests of examples add to a command, and the commands they do not run, with reasons.

`SMALLER` is the tiny setting of long commands: arguments put after those of the page, so that a run
takes seconds. `NOT_RUN` holds every command that is not run; its check runs instead.
"""

import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]

ONE_DEVICE = "--config.mesh.data=1 --config.mesh.fsdp=1 --config.mesh.sp=1 --config.batch=2"
TINY_EVALUATION = "--config.evaluate.short={'least_shots':2,'chunks':3,'shot_chunks':(1,2)}"
TINY_DIT = (
    "--config.corpus.videos=8 --config.corpus.chunks=4 --config.corpus.shot_chunks=(1,2) "
    "--config.windows.batch=2 --config.windows.targets=1 --config.unroll=1 --config.recycling=none "
    "--config.model.dim=64 --config.model.ffn_dim=64 --config.model.layers=1"
)
RECIPE = r"train --config=(\S*/)?"
SMALLER: dict[str, str] = {
    # A model call per chunk instead of the checkpoint's number of steps.
    r"sample\b(?!.*--steps)": "--steps=1",
    r"demo\b": "--steps=1",
    r"compare\b": "--config.sample.steps=1",
    # The 5B recipes, on a checkpoint of tiny models and a dataset of seven short clips.
    r"data check DATASET": "--size=64x32 --chunk=2",
    r"data encode": "--size=64x32 --chunks=4 --dtype=float32 --pad",
    RECIPE + "ar_5b": f"{ONE_DEVICE} --config.loop.steps=1 --config.recycling=none "
    "--config.ffn_chunks=1 --config.dtype=float32 --config.cut.size=(64,32) "
    "--config.cut.chunks=4 --config.cut.pad=true",
    RECIPE + "dmd_5b": f"{ONE_DEVICE} --config.loop.steps=1 --config.ffn_chunks=1 "
    "--config.dtype=float32 --config.stream_dtype=float32 --config.lora.rank=4 "
    "--config.rollout.steps=2 --config.rollout.chunks=2 --config.chunks_per_shot=1 "
    "--config.precision.student=none --config.precision.teacher=none "
    "--config.precision.critic=none --config.preview.prompts=()",
    RECIPE + "lora_5b": "--config.loop.steps=1 --config.ffn_chunks=1 --config.dtype=float32 "
    "--config.cut.size=(64,32) --config.lora.rank=4",
    RECIPE + "own_clips": "--config.loop.steps=1",
    RECIPE + "own_clips:vae": "--config.phases=[{'steps':1,'batch':2,'frames':1}]",
    r"convert --source=PATH/TO/WEIGHTS": "--heads=4 --text_len=48 --overwrite",
    r"convert --source=model_4o6.pt": "--heads=4 --text_len=48",
    # The small world's stages, for one update.
    RECIPE + r"small_world(\.py)?:vae": "--config.loop.steps=1 "
    "--config.phases=[{'steps':1,'batch':2,'frames':1}]",
    RECIPE + r"small_world(\.py)?:text": "--config.loop.steps=1 --config.batch=4 "
    "--config.model.layers=1",
    RECIPE + r"small_world(\.py)?:dmd": "--config.loop.steps=1 --config.batch=2 "
    "--config.rollout.chunks=2 --config.shot_chunks=(1,2) --config.lora.rank=4 --config.unroll=1 "
    "--config.dtype=float32 --config.preview.prompts=()",
    RECIPE + r"small_world(\.py)?:(ar|recycled)": f"--config.loop.steps=1 {TINY_DIT}",
    r"evaluate\b": f"--parts=ceilings {TINY_EVALUATION} --config.evaluate.batch=2",
    # Estimates for Wan2.2 without a compiler for GPUs, one kernel of 20, a short benchmark.
    r"plan\b": "--no-compile --config.checkpoint=none_here",
    r"kernels check": "--kernel=nvfp4_dequantize --no-interpret",
    r"bench sampler": "--chunks=6",
}
"""Pattern of a command's arguments -> arguments added to it."""


def smaller(command: str) -> list[str]:
    """The arguments added to a `longlive` command."""
    added = []
    for pattern, arguments in SMALLER.items():
        if re.match(pattern, command):
            added += shlex.split(arguments, posix=False)
    return added


def longlive_arguments(words: list[str]) -> list[str] | None:
    """The arguments of `longlive` that a command amounts to; None if it is another program."""
    if words[0] in ("longlive", ".venv/bin/longlive"):
        return words[1:]
    if words[0] == "./launch/demo.sh":
        assert 'longlive_jax demo "$@"' in (REPOSITORY / "launch/demo.sh").read_text()
        return ["demo", *words[1:]]
    if words[0] == "./launch/local.sh":
        assert 'longlive" train "$@"' in (REPOSITORY / "launch/local.sh").read_text()
        return ["train", *words[1:]]
    if words[:3] == ["python", "-m", "longlive_jax"]:
        return words[3:]
    return None


def check_install(words: list[str]) -> None:
    """The extra that `pip install` names exists."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
        assert extra in project["optional-dependencies"]


def check_script(words: list[str]) -> None:
    """The script exists and bash can parse it."""
    script = next(word for word in words if word.endswith(".sh"))
    subprocess.run(["bash", "-n", str(REPOSITORY / script)], check=True)


def check_container(words: list[str]) -> None:
    """The container file exists."""
    assert (REPOSITORY / words[words.index("-f") + 1]).is_file()


def check_slurm(words: list[str]) -> None:
    """The script parses, and `longlive train` knows the arguments after it."""
    check_script(words)
    after = words[words.index(next(word for word in words if word.endswith(".sh"))) + 1 :]
    check_training(["--hosts=auto", *after])


def check_kubernetes(words: list[str]) -> None:
    """The manifest is YAML, and `longlive train` knows the arguments of its command."""
    job = list(yaml.safe_load_all((REPOSITORY / words[-1]).read_text()))[-1]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    command = shlex.split(" ".join(container["args"]))
    check_training(command[command.index("train") + 1 :])


def check_training(arguments: list[str]) -> None:
    """The parser and the recipe of `longlive train` accept the arguments."""
    from longlive_jax.cli.options import parse_command
    from longlive_jax.cli.train import _parser

    parse_command(_parser(), arguments, "train")


def check_conformance(words: list[str]) -> None:
    """The program and its folder exist; tests/test_conformance.py compares the same numbers."""
    assert all((REPOSITORY / word).exists() for word in words[1:])
    assert (REPOSITORY / "tests" / "test_conformance.py").is_file()


def check_module(words: list[str]) -> None:
    """The module exists."""
    assert (REPOSITORY / f"{words[2].replace('.', '/')}.py").is_file()


def check_tool(words: list[str]) -> None:
    """The tool belongs to the development environment."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert Path(words[0]).name in " ".join([*extras["dev"], *extras["docs"]])


NOT_RUN: dict[str, tuple[str, Callable[[list[str]], None]]] = {
    "needs the network; tests/packaging installs the wheel": ("pip install", check_install),
    "runs these tests": ("./launch/test.sh", check_script),
    "needs a container engine; tests/packaging reads the file": ("docker build", check_container),
    "takes minutes; tests/test_conformance.py compares the same numbers": (
        "python tests/conformance.py",
        check_conformance,
    ),
    "needs Slurm": ("sbatch", check_slurm),
    "needs a Kubernetes cluster": ("kubectl apply", check_kubernetes),
    "compiles all kernels; tests/longlive_jax/bench/test_kernels_page.py": (
        "python -m longlive_jax.bench.kernels_page",
        check_module,
    ),
    "needs tokamax; tests/longlive_jax/planning/test_kernel_model.py reads its counts": (
        "python -m longlive_jax.bench.calibration",
        check_module,
    ),
    "compiles 30 layers; tests/longlive_jax/planning/test_sampling_step.py compiles two": (
        "python -m longlive_jax.planning.sampling",
        check_module,
    ),
    "serves until it is stopped; test_site builds the site": (".venv/bin/mkdocs serve", check_tool),
    "all stages, hours; its commands are on the page of the small world": (
        "./launch/small_world.sh",
        check_script,
    ),
}
"""Reason -> beginning of the command, and the check that runs instead."""
