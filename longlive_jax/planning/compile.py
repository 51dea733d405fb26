"""Compiles a planned step for GPUs that are not here, in a process of its own.

XLA's compiler for GPUs is in JAX's CUDA plugin, which needs no GPU for this. The process must not
look for one, and JAX decides that when it starts; so `compiled` runs this module as
`python -m longlive_jax.planning.compile` with the job on its standard input.
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
"""Seconds after which the process is ended."""

BESIDE = Path(sys.prefix) / "compile"
"""Where launch/setup.sh puts the plugin: apart from other packages, as JAX would complain of the
missing GPU at every start."""

OPTIONS = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_force_compilation_parallelism": 1,
    "xla_backend_optimization_level": 0,
}
"""Kernels are made as cheaply as possible, for nothing runs; where arrays lie is decided before.
Products are cuBLAS's, with its workspace. (The 5B's step: 25 s, with the defaults 65 s.)"""


def refusal() -> str | None:
    """Why nothing can be compiled here, or None."""
    if _plugin() is not None or (BESIDE / "jax_plugins" / "xla_cuda13").is_dir():
        return None
    return (
        "the peak memory is found by compiling with JAX's CUDA plugin, which is not installed: "
        "`pip install -e '.[plan]'` (no GPU needed); or say --no-compile for all the rest"
    )


def _plugin() -> Any:
    try:
        return importlib.util.find_spec("jax_plugins.xla_cuda13")
    except ModuleNotFoundError:
        return None


def compiled(job: dict[str, Any]) -> dict[str, Any]:
    """Memory and traffic of a job (`_work`'s arguments, ready for JSON).

    Raises UserError without the plugin, Failure if the compiler fails or takes half an hour.
    """
    if (why := refusal()) is not None:
        raise UserError(why)
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
    except subprocess.TimeoutExpired as error:
        raise Failure(f"plan: the compiler was not done after {TIMEOUT} s") from error
    found = [x.removeprefix(PREFIX) for x in done.stdout.splitlines() if x.startswith(PREFIX)]
    last = (done.stderr.strip().splitlines() or ["the compiler said nothing"])[-1]
    report = json.loads(found[-1]) if found else {"failure": f"exit code {done.returncode}, {last}"}
    if "failure" in report:
        raise Failure(f"plan: the step could not be compiled: {_reason(report['failure'])}")
    return report


def _reason(said: str) -> str:
    lacking = [name for name in ("ptxas", "nvlink", "libdevice") if f"{name}_version" in said]
    if lacking or "libdevice not found" in said:
        tools = " and ".join(lacking) or "libdevice"
        return f"no {tools}; install a CUDA toolkit, or its compiler by `pip install -e '.[plan]'`"
    return said


def main() -> int:
    """Reads a job and prints the line that `compiled` looks for."""
    job = json.load(sys.stdin)
    if _plugin() is None:
        sys.path.append(str(BESIDE))
        importlib.invalidate_caches()
    try:
        found = _work(**job)
    except Exception as error:  # whatever it is, the caller shows it as one line
        found = {"failure": f"{type(error).__name__}: {error}"}
    print(PREFIX + json.dumps(found))
    return int("failure" in found)


def _work(stage: dict, model: dict, clip: dict, chip: str) -> dict[str, Any]:
    """What the compiler says of the step of these settings."""
    from jax.experimental import topologies

    from longlive_jax.models.wan import DiTConfig
    from longlive_jax.parallel.mesh import make_mesh
    from longlive_jax.planning.chips import chip_of
    from longlive_jax.planning.collectives import traffic
    from longlive_jax.planning.step import Clip, PlannedStep, lower
    from longlive_jax.spec import build
    from longlive_jax.training.stages.wan_ar import WanARStage

    step = PlannedStep(build(WanARStage, stage), build(DiTConfig, model), build(Clip, clip))
    count, target = step.stage.mesh.size, chip_of(chip)
    there = topologies.get_topology_desc(
        platform="cuda", target_config=target.description(), topology=target.topology(count)
    )
    began = time.perf_counter()
    lowered = lower(step, make_mesh(step.stage.mesh, there.devices))
    traced = time.perf_counter()
    program = lowered.compile(compiler_options=OPTIONS)
    finished = time.perf_counter()
    memory, text = program.memory_analysis(), program.as_text()
    if memory is None or text is None:
        raise Failure("the compiler says nothing of memory; use the JAX version of the plugin")
    return {
        "peak": memory.peak_memory_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "collectives": {
            kind: dataclasses.asdict(found) for kind, found in traffic(text, count).items()
        },
        "seconds": {"tracing": traced - began, "compiling": finished - traced},
    }


if __name__ == "__main__":
    raise SystemExit(main())
