"""`longlive kernels prove`: the first hour of a GPU, in ten minutes without a search for tiles.

Each kernel runs in a process of its own (`prove_kernel`), whose whole process group is killed after
a timeout. After every kernel the report is replaced, so that a device that hangs or disappears, or
an interrupted run, leaves what ran before. This process never uses the GPU itself.
"""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from longlive_jax.bench.prove_kernel import PREFIX, REPEATS, RUNS, chip_of, limit
from longlive_jax.bench.prove_report import Report, verdict
from longlive_jax.spec import Failure, UserError, nearest
from pallas_kernels.catalog import catalog
from pallas_kernels.kernel import CHIPS, Kernel, abstract

BUDGET = 600.0
"""Seconds of a whole run without a search: the sum of all timeouts."""
QUERY = 60.0
"""Seconds within which the device must answer a question."""
START, COMPILE, CANDIDATE = 12.0, 1.5, 6.0
"""Modelled seconds of the static laws and of a process until it computes, of compiling one
function, and of one candidate of the tile space."""
SLOWEST = 20
"""A peer, or an oracle in float32, is modelled this many times slower than the kernel's limit."""
COMMAND = (sys.executable, "-m", "longlive_jax.bench.prove_kernel")
Line = Mapping[str, Any]
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Device:
    """The GPU, and how to run kernels on it; tests replace its functions.

    Attributes:
      kind: model name ("NVIDIA H200").
      chip: architecture of its kernels ("sm_90a").
      command: the command line that proves a kernel, given its name and whether to search tiles.
      answers: whether the device still answers.
      laws: failures of the static laws of a kernel, given its name and seconds, or a reason in
        words why they were not checked.
    """

    kind: str
    chip: str
    command: Callable[[str, bool], list[str]]
    answers: Callable[[], bool]
    laws: Callable[[str, float], list[str] | str]


def find_device() -> Device:
    """This machine's GPU; UserError in one line if there is none that kernels are written for."""
    findings = next(iter(_lines(list(COMMAND), QUERY)))
    if findings.get("end") == "hung":
        raise Failure(f"kernels prove: the GPU does not answer within {QUERY:.0f} s; reset it")
    if findings.get("platform") != "gpu":
        raise UserError(
            "kernels prove: it needs an NVIDIA GPU and there is none; `longlive kernels check` "
            "compiles and interprets the kernels without one"
        )
    chip = CHIPS.get(findings["capability"])
    if chip is None:
        raise UserError(
            f"kernels prove: no kernels for {findings['device']} (compute capability "
            f"{findings['capability']}); `longlive kernels check` lists those of {', '.join(CHIPS)}"
        )

    def command(name: str, tune: bool) -> list[str]:
        return [*COMMAND, name, *(["--tune"] if tune else [])]

    def answers() -> bool:
        return any(line.get("platform") == "gpu" for line in _lines(list(COMMAND), QUERY))

    def laws(name: str, timeout: float) -> list[str] | str:
        return static_laws(name, chip, timeout)

    return Device(findings["device"], chip, command, answers, laws)


def static_laws(name: str, chip: str, timeout: float) -> list[str] | str:
    """What `kernels check` says of a kernel's machine code, or why it could not be checked."""
    from longlive_jax.bench.kernels import check

    try:
        return list(check(chip, [name], interpret=False, timeout=timeout)[0]["failures"])
    except (UserError, Failure) as reason:
        return str(reason)


@dataclasses.dataclass(frozen=True)
class Step:
    """One kernel of the plan.

    Attributes:
      kernel: name.
      modelled: modelled seconds.
      timeout: seconds after which its process is killed; unused ones go to the next kernels.
    """

    kernel: str
    modelled: float
    timeout: float


def plan(chip: str, device: str, names: Sequence[str] | None, *, tune: bool) -> list[Step]:
    """The kernels of a chip, quick ones first, with timeouts within the budget.

    A search for tiles has twice its modelled time. Raises UserError for an unknown kernel.
    """
    known = {name: x for name, x in catalog().items() if chip in x.chips}
    for name in names or ():
        if name not in known:
            raise UserError(f"kernels prove: no kernel {name!r} for {chip}{nearest(name, known)}")
    seconds = {
        name: modelled_seconds(known[name], device, tune=tune)
        for name in dict.fromkeys(names or known)
    }
    chosen = sorted(seconds, key=lambda name: seconds[name])
    modelled = [seconds[name] for name in chosen]
    spare = BUDGET - QUERY if not tune else 2 * sum(modelled)
    share = min(spare / max(sum(modelled), 1e-9), 4.0)
    return [Step(name, round(seconds[name], 1), round(share * seconds[name], 1)) for name in chosen]


def modelled_seconds(kernel: Kernel, device: str, *, tune: bool) -> float:
    """Seconds for start, compilations, all runs of the kernel, its oracle and its peers."""
    least = limit(kernel.cost(*abstract(kernel.production)), chip_of(device)) or 0.01
    runs = RUNS + 5 * (REPEATS + 1)
    candidates = 1
    for values in kernel.tiles.values():
        candidates *= len(values)
    search = CANDIDATE * candidates if tune and kernel.tiles else 0.0
    return START + 6 * COMPILE + least * (runs + 2 * SLOWEST * (REPEATS + 1)) + search


def prove(device: Device, steps: Sequence[Step], report: Report, *, tune: bool, say: Say) -> int:
    """Proves kernels one after the other; returns 1 if any is not proven, else 0.

    The report is written after each kernel, and also if the run is interrupted.
    """
    saved = 0.0
    rows = report.rows
    for step in steps:
        rows.append({"kernel": step.kernel, "state": "not run", "failure": "the run ended before"})
    report.write()
    for row, step in zip(rows, steps, strict=True):
        # 1. Run it, with the seconds that earlier kernels left.
        begin = time.monotonic()
        row.update(state="interrupted", failure="the run was interrupted")
        report.write()
        findings = run_kernel(device, step.kernel, step.timeout + saved, tune=tune)
        took = time.monotonic() - begin
        saved = max(0.0, saved + step.timeout - took)
        # 2. Record it.
        row.pop("failure")
        row.update(verdict(findings), seconds_taken=round(took, 1))
        if row["state"] in ("hung", "crashed") and not device.answers():
            row["failure"] += "; the device does not answer any more"
            _abandon(rows)
            report.write()
            say(f"{step.kernel}: {row['failure']}")
            break
        report.write()
        say(describe(row))
    return int(any(row["state"] != "proven" for row in rows))


def _abandon(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["state"] == "not run":
            row["failure"] = "the device does not answer any more"


def run_kernel(device: Device, name: str, timeout: float, *, tune: bool) -> dict[str, Any]:
    """What the static laws and the process of a kernel found, merged; `end` says how it ended."""
    findings: dict[str, Any] = {}
    begin = time.monotonic()
    laws = device.laws(name, timeout)
    findings["laws"] = laws
    if laws and not isinstance(laws, str):
        return findings | {"end": "laws", "failure": laws[0]}
    left = timeout - (time.monotonic() - begin)
    if left <= 0:
        return findings | {"end": "laws", "failure": f"checking them took all of {timeout:.0f} s"}
    for line in _lines(device.command(name, tune), left):
        findings |= line
    return findings


def _lines(command: list[str], timeout: float) -> Iterator[Line]:
    """Yields what a process reports, and at last {"end": "ended", "hung" or "crashed"}.

    Its whole process group is killed at the timeout, and when the reader stops early.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stderr is not None
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    # Threads read both pipes: a process that hangs neither writes nor closes them.
    readers = [
        threading.Thread(target=_forward, args=(process.stdout, lines), daemon=True),
        threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True),
    ]
    for reader in readers:
        reader.start()
    stop = time.monotonic() + timeout
    try:
        while (line := lines.get(timeout=max(0.0, stop - time.monotonic()))) is not None:
            if line.startswith(PREFIX):
                yield json.loads(line.removeprefix(PREFIX))
        code = process.wait(timeout=max(0.1, stop - time.monotonic()))
        readers[1].join(1.0)
        last = next((x.strip() for x in reversed(errors) if x.strip()), "no message")
        yield {"end": "ended" if code in (0, 1) else "crashed", "code": code, "last": last[:200]}
    except (queue.Empty, subprocess.TimeoutExpired):
        yield {"end": "hung", "after": round(timeout, 1)}
    finally:
        _kill_group(process)


def _forward(stream: Any, lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _kill_group(process: subprocess.Popen) -> None:
    """Kills a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process that is stuck in the driver cannot be waited for.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5.0)


def describe(row: Mapping[str, Any]) -> str:
    """One line about a kernel."""
    if row["state"] != "proven":
        return f"{row['kernel']}: {row['state']}: {row['failure']}"
    share = f", {100 * row['share']:.0f} % of the limit" if row.get("share") else ""
    peers = ", ".join(
        f"{name} {1e6 * x:.0f} us" for name, x in row["peers"].items() if not isinstance(x, str)
    )
    used = "auto takes it" if row["faster"] else "auto does not take it"
    return f"{row['kernel']}: proven, {1e6 * row['seconds']:.0f} us{share}; {peers}; {used}"
