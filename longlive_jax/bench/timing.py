"""Timers, compilation counters, peak memory, and a description of the machine."""

import collections
import dataclasses
import datetime
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from jax import monitoring

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts the compilations of each function inside a `with` block.

    A program read from the persistent cache counts too: the point is how often a function was
    called with new shapes.

    Attributes:
      counts: number of compilations by function name.
      seconds: total compilation time.
    """

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds = 0.0

    def _count(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED:
            name = str(kwargs.get("fun_name", "?")).removeprefix("jit(").removesuffix(")")
            self.counts[name] += 1
            self.seconds += duration_secs

    def __enter__(self) -> Self:
        monitoring.register_event_duration_secs_listener(self._count)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        monitoring.unregister_event_duration_listener(self._count)


class Stages:
    """A timer by stage, whose calls wait for the device.

    Attributes:
      seconds: duration of every call, by stage.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def run[**P, T](self, stage: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Makes a call and adds its duration to `stage`, including the wait for all its arrays.

        Returns the result of the call.
        """
        begin = time.perf_counter()
        result = jax.block_until_ready(call(*args, **kwargs))
        self.seconds.setdefault(stage, []).append(time.perf_counter() - begin)
        return result

    def total(self, stage: str) -> float:
        """Seconds of all calls of a stage."""
        return sum(self.seconds.get(stage, ()))

    def median(self, stage: str, *, skip: int = 0) -> float:
        """Median seconds of a stage's calls after the first `skip`."""
        return statistics.median(self.seconds[stage][skip:])


def repeated(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Times `repeats` calls after an untimed one.

    Returns their median, least and most seconds, and `repeats`. Raises ValueError if `repeats` < 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1, got {repeats}")
    stages = Stages()
    jax.block_until_ready(call())
    for _ in range(repeats):
        stages.run("call", call)
    seconds = stages.seconds["call"]
    return {
        "median": round(statistics.median(seconds), 5),
        "least": round(min(seconds), 5),
        "most": round(max(seconds), 5),
        "repeats": repeats,
    }


def peak_memory() -> dict[str, float]:
    """Peak memory so far in GiB: `host_gib` of this process, `device_gib` of an accelerator."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
        kib = int(lines[0].split()[1])
    else:
        unit = 1024 if sys.platform == "darwin" else 1
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
    peak = {"host_gib": round(kib / 2**20, 3)}
    device = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in device:
        peak["device_gib"] = round(device["peak_bytes_in_use"] / 2**30, 3)
    return peak


def machine() -> dict[str, Any]:
    """Device, cores, load, versions and date, to accompany every measurement."""
    device = jax.local_devices()[0]
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "device": device.device_kind if device.platform != "cpu" else _processor(),
        "platform": device.platform,
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _processor() -> str:
    """Model name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report_settings(spec: Any) -> dict[str, Any]:
    """Settings of a benchmark by the names of its command-line options, as reports have them."""
    settings = dataclasses.asdict(spec)
    return {"chunk" if name == "chunk_frames" else name: x for name, x in settings.items()}
