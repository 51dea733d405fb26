"""Compiles a planned train step for GPUs that are not present, in a separate process.

XLA's GPU compiler is part of JAX's CUDA plugin and needs no GPU. The process must not look for one,
and JAX decides that at start-up; so `compile_step` runs this module as
`python -m longlive_jax.planning.compile` with the job as JSON on its standard input.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from longlive_jax.spec import Failure, UserError

PREFIX = "PLANNED "
TIMEOUT = 1800
"""Seconds after which the process is killed."""

PLUGIN_DIR = Path(sys.prefix) / "compile"
"""Where launch/setup.sh installs the plugin. It is kept out of site-packages because JAX would
warn about the missing GPU at every start."""

OPTIONS = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_force_compilation_parallelism": 1,
    "xla_backend_optimization_level": 0,
}
"""XLA options that make kernel generation cheap, since nothing runs; buffers are assigned before
that. Matrix products are cuBLAS's, with its workspace. (The 5B model's step compiles in 25 s
instead of 65 s with XLA's defaults.)"""


def refusal() -> str | None:
    """Why nothing can be compiled on this machine, or None if it can."""
    if _find_plugin() is not None or (PLUGIN_DIR / "jax_plugins" / "xla_cuda13").is_dir():
        return None
    return (
        "peak memory comes from a compile with JAX's CUDA plugin, which is not installed. "
        "Run `pip install -e '.[plan]'` (no GPU needed), or add --no-compile to skip it"
    )


def _find_plugin() -> Any:
    """Import spec of the CUDA plugin among the environment's packages, or None."""
    try:
        return importlib.util.find_spec("jax_plugins.xla_cuda13")
    except ModuleNotFoundError:
        return None


def compile_step(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles a job in a separate process and returns its memory and traffic.

    Args:
      job: keyword arguments of `_measure`, as JSON values.

    Returns:
      peak: peak memory of a device, bytes.
      arguments: memory of the step's arguments, bytes.
      temporary: memory of temporary buffers, bytes.
      collectives: `Traffic` of a device by kind, as dicts.
      seconds: time spent on tracing and on compiling.

    Raises UserError if the plugin is not installed, and Failure if the compiler fails or takes
    longer than `TIMEOUT`.
    """
    if (reason := refusal()) is not None:
        raise UserError(reason)
    # 1. Run the compiler.
    try:
        process = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
    except subprocess.TimeoutExpired as error:
        raise Failure(f"plan: the compiler did not finish within {TIMEOUT} s") from error
    # 2. Parse the report line, or explain the failure.
    lines = [x.removeprefix(PREFIX) for x in process.stdout.splitlines() if x.startswith(PREFIX)]
    last = (process.stderr.strip().splitlines() or ["no output on stderr"])[-1]
    failure = {"failure": f"exit code {process.returncode}, {last}"}
    report = json.loads(lines[-1]) if lines else failure
    if "failure" in report:
        raise Failure(f"plan: the step could not be compiled: {_explain(report['failure'])}")
    return report


def _explain(message: str) -> str:
    """The compiler's error, or the missing CUDA tool and its remedy if that is the cause."""
    lacking = [name for name in ("ptxas", "nvlink", "libdevice") if f"{name}_version" in message]
    if lacking or "libdevice not found" in message:
        tools = " and ".join(lacking) or "libdevice"
        return (
            f"{tools} not found. Install a CUDA toolkit, or its compiler by "
            "`pip install -e '.[plan]'`"
        )
    return message


def main() -> int:
    """Reads a job from standard input and prints the line that `compile_step` parses."""
    job = json.load(sys.stdin)
    if _find_plugin() is None:
        sys.path.append(str(PLUGIN_DIR))
        importlib.invalidate_caches()
    try:
        report = _measure(**job)
    except Exception as error:  # any error: the parent process shows it as one line
        report = {"failure": f"{type(error).__name__}: {error}"}
    print(PREFIX + json.dumps(report))
    return int("failure" in report)


def _step(stage: dict, model: dict, clip: dict, group: str | None) -> Any:
    """The planned step: of stage `clips`, or with `group` of stage `dmd`."""
    from longlive_jax.models.wan import DiTConfig
    from longlive_jax.planning.distillation_step import PlannedDistillation
    from longlive_jax.planning.step import Clip, PlannedStep
    from longlive_jax.spec import build
    from longlive_jax.training.stages.wan_ar import WanARStage
    from longlive_jax.training.stages.wan_dmd import WanDMDStage

    shapes = build(DiTConfig, model), build(Clip, clip)
    if group is None:
        return PlannedStep(build(WanARStage, stage), *shapes)
    return PlannedDistillation(build(WanDMDStage, stage), *shapes, group)


def _measure(
    stage: dict, model: dict, clip: dict, chip: str, group: str | None = None
) -> dict[str, Any]:
    """Compiles the step of these settings; see `compile_step` for the report.

    With `group` it is the update of this group in stage `dmd`, else the step of stage `clips`.
    """
    from jax.experimental import topologies

    from longlive_jax.parallel.mesh import make_mesh
    from longlive_jax.planning.chips import get_chip
    from longlive_jax.planning.collectives import traffic
    from longlive_jax.planning.step import lower

    # 1. Describe the step and the devices.
    step = _step(stage, model, clip, group)
    count, target = step.stage.mesh.size, get_chip(chip)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target.description(), topology=target.topology(count)
    )
    # 2. Trace and compile.
    began = time.perf_counter()
    lowered = lower(step, make_mesh(step.stage.mesh, topology.devices))
    traced = time.perf_counter()
    program = lowered.compile(compiler_options=OPTIONS)
    finished = time.perf_counter()
    # 3. Read memory and traffic off the program.
    memory, text = program.memory_analysis(), program.as_text()
    if memory is None or text is None:
        raise Failure("no memory analysis from the compiler. Install the plugin of JAX's version")
    return {
        "peak": memory.peak_memory_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "collectives": {
            kind: dataclasses.asdict(volume) for kind, volume in traffic(text, count).items()
        },
        "seconds": {"tracing": traced - began, "compiling": finished - traced},
    }


if __name__ == "__main__":
    raise SystemExit(main())
