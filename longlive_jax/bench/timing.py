"""Clocks, compilation counters, peak memory, and what machine it was."""

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
    """Counts the compilations of each function while the `with` block runs.

    A program found in the persistent cache counts too: what matters is how often a function was
    asked for with new shapes. `seconds` is what all of them took.
    """

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds = 0.0

    def _hear(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED:
            name = str(kwargs.get("fun_name", "?")).removeprefix("jit(").removesuffix(")")
            self.counts[name] += 1
            self.seconds += duration_secs

    def __enter__(self) -> Self:
        monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        monitoring.unregister_event_duration_listener(self._hear)


class Stages:
    """Seconds by stage, summed over the calls of `run`, each of which waits for the device."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def run[**P, T](self, stage: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of the call, timed until every array of it is there."""
        begin = time.perf_counter()
        result = jax.block_until_ready(call(*args, **kwargs))
        self.seconds.setdefault(stage, []).append(time.perf_counter() - begin)
        return result

    def total(self, stage: str) -> float:
        """All calls of a stage."""
        return sum(self.seconds.get(stage, ()))

    def median(self, stage: str, *, skip: int = 0) -> float:
        """The middle one of the calls of a stage, the first `skip` left out."""
        return statistics.median(self.seconds[stage][skip:])


def repeated(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median, least and most seconds of `repeats` calls, after one that is not counted."""
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; time at least one call")
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
    """GiB at the most so far: of this process, and of the accelerator where there is one."""
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
    """Device, cores, versions and date: without them a time says nothing."""
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
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report_settings(spec: Any) -> dict[str, Any]:
    """The settings of a benchmark as a report has them: by the names of its options."""
    settings = dataclasses.asdict(spec)
    return {"chunk" if name == "chunk_frames" else name: x for name, x in settings.items()}
