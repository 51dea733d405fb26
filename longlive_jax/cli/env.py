"""`longlive env [--json]`: versions, devices, memory and caches, for a bug report.

A probe that fails prints "unavailable" and the reason; the others go on.
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longlive_jax.cli.app import Parser
from longlive_jax.spec import UserError

GIB = 2**30
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
PREFIXES = ("LONGLIVE_", "JAX_", "XLA_")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "XDG_CACHE_HOME")
SECRETS = ("TOKEN", "SECRET", "PASSWORD", "_KEY")
"""Parts of the names of variables whose values are not printed."""
TIMEOUT_S = 20.0
"""Longest time for a program that a probe runs."""


def main(argv: Sequence[str]) -> int:
    """Prints what all probes say, as lines or as JSON."""
    parser = Parser("env", __doc__ or "")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    args = parser.parse_args(argv)
    report = {name: run_probe(probe) for name, probe in PROBES.items()}
    print(json.dumps(report, indent=1) if args.json else text(report))
    return 0


def run_probe(probe: Callable[[], Any]) -> Any:
    """What a probe returns, or "unavailable" with the reason if it raises anything."""
    try:
        return probe()
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"unavailable: {reason}"


def text(report: Mapping[str, Any]) -> str:
    """The report as aligned lines; a list or mapping has one line per item."""
    width = max(map(len, report))
    lines = []
    for name, value in report.items():
        if isinstance(value, Mapping):
            value = [f"{key} {item}" for key, item in value.items()]
        items = value if isinstance(value, list) else [value]
        for i, item in enumerate(items or ["none"]):
            lines.append(f"{'' if i else name:<{width}}  {item}")
    return "\n".join(lines)


def package() -> str:
    """Version of this package, and where it is."""
    import longlive_jax

    return f"{longlive_jax.__version__} in {Path(longlive_jax.__file__).parent}"


def interpreter() -> str:
    """Version of Python, and its program."""
    return f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}"


def system() -> str:
    """Operating system and architecture."""
    return f"{platform.platform()}, {platform.machine()}"


def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    return {name: str(run_probe(functools.partial(_version, name))) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise UserError("not installed") from None


def cpu() -> str:
    """Name of the CPU, its cores, and how many of them this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{next(iter(names), platform.processor())}, {usable} of {os.cpu_count()} cores usable"


def memory() -> str:
    """Memory of the machine, and what is available of it where the system says so."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    available = f", {free[0] / GIB:.1f} GiB available" if free else ""
    return f"{total / GIB:.1f} GiB{available}"


def devices() -> list[str]:
    """JAX's devices with their memory."""
    import jax

    lines = [f"{jax.default_backend()}: {jax.device_count()}, processes: {jax.process_count()}"]
    for device in jax.local_devices():
        stats = run_probe(device.memory_stats)
        limit = stats.get("bytes_limit") if isinstance(stats, Mapping) else None
        size = f", {limit / GIB:.1f} GiB usable" if limit else ""
        lines.append(f"{device.id} {device.device_kind}{size}")
    return lines


def gpu_driver() -> list[str]:
    """Name, driver version and memory of each NVIDIA GPU, as the driver says."""
    program = shutil.which("nvidia-smi")
    if program is None:
        raise UserError("nvidia-smi is not on the PATH")
    query = ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    command = [program, *query]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise UserError(done.stderr or done.stdout or f"nvidia-smi exited with {done.returncode}")
    return done.stdout.strip().splitlines()


def cuda() -> list[str]:
    """Versions of the installed packages of CUDA and of JAX's plugin for it."""
    names = {
        item.metadata["Name"]: item.version
        for item in importlib.metadata.distributions()
        if (item.metadata["Name"] or "").lower().startswith(("jax-cuda", "nvidia-"))
    }
    return [f"{name} {version}" for name, version in sorted(names.items())]


def extras() -> dict[str, str]:
    """Whether the optional extras are installed."""
    from longlive_jax.planning.deviceless import refusal

    missing = refusal()
    return {
        "plan": "installed" if missing is None else f"not installed ({missing})",
        "k8s": "installed" if _is_installed("kubernetes") else "not installed",
    }


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def compilation_cache() -> str:
    """Folder and size of the compilation cache."""
    from longlive_jax.io.compilation_cache import compilation_cache_folder

    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or compilation_cache_folder())
    if not folder.is_dir():
        return f"{folder}, not created yet"
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    return f"{folder}, {len(files)} files, {size / 1e6:.1f} MB"


def checkpoint() -> str:
    """The built-in checkpoint."""
    from longlive_jax.io.builtin import builtin_checkpoint

    return str(builtin_checkpoint())


def recipes() -> list[str]:
    """The recipes that ship with the package, and their folder."""
    from longlive_jax.cli.recipes import known_recipes, recipe_folder

    return [f"{', '.join(known_recipes())} in {recipe_folder()}"]


def environment() -> list[str]:
    """Environment variables that change what the package, JAX or XLA does."""
    chosen = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(PREFIXES) or name in VARIABLES
    }
    return [
        f"{name}={'(not shown)' if any(word in name for word in SECRETS) else value}"
        for name, value in chosen.items()
    ]


PROBES: dict[str, Callable[[], Any]] = {
    "longlive-jax": package,
    "Python": interpreter,
    "system": system,
    "packages": versions,
    "CPU": cpu,
    "memory": memory,
    "devices": devices,
    "GPU driver": gpu_driver,
    "CUDA packages": cuda,
    "extras": extras,
    "compilation cache": compilation_cache,
    "checkpoint": checkpoint,
    "recipes": recipes,
    "environment": environment,
}
"""Name in the report -> what finds it out."""
