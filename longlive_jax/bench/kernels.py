"""The state of every Pallas kernel: interpreted, compiled for a chip, run on a GPU.

Compilation needs no GPU and reports a kernel's instructions, registers, spills and shared memory.
Interpretation runs the tests that compare a kernel with its reference and detect races. Whether a
kernel has run on a GPU is read from recorded results.
"""

import collections
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from longlive_jax.bench.kernels_compile import PREFIX
from longlive_jax.planning import deviceless, kernel_model
from longlive_jax.planning.kernel_laws import violations
from longlive_jax.spec import Failure, UserError, nearest

ARCHITECTURES = {"sm_100a": "gb200", "sm_90a": "h200"}
"""Architecture -> a chip of it in `planning.chips`."""
ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results")
CYCLES = (
    "tensor_cycles", "smem_cycles", "softmax_cycles", "issue_cycles", "stall_cycles",
    "step_cycles",
)  # fmt: skip
"""Keys of a row that `kernel_model.step_cycles` fills."""
TIMEOUT = 1800
"""Seconds after which a process is killed by default."""

TEST = "tests/pallas_kernels/test_records.py::test_it_equals_its_oracle_without_races"
"""The test that runs the cases of a kernel's record in the interpreter."""

Tick = Callable[[int, int], None]
"""Progress callback, called with (done, total)."""


def check(
    chip: str,
    names: Sequence[str] | None = None,
    *,
    interpret: bool = True,
    ticks: Any = None,
    timeout: float = TIMEOUT,
) -> list[dict[str, Any]]:
    """Checks the kernels of a chip ("sm_100a"), or only the named ones; returns one row each.

    A row has the keys
    kernel, chip, instructions (name -> count), spill_bytes, registers, smem_bytes, tensor_columns:
      counted by the compilers;
    register_pool, registers_asked: registers of a block at launch, and those that its warpgroups
      ask for;
    tensor_cycles, smem_cycles, softmax_cycles, issue_cycles, stall_cycles, step_cycles: cycles of a
      step, and model_share, the share of the chip's limit (`planning.kernel_model`);
    interpreted (None if it did not run), not_run (why, or None), compiled, executed_on (name of a
      device, or None), failures (messages).

    Args:
      chip: architecture, a key of `ARCHITECTURES`.
      names: kernels to check; None for all of the chip.
      interpret: whether to run the interpreter tests.
      ticks: `ticks(text)` returns a progress callback (done, total) for a phase of the work.
      timeout: seconds after which a process is killed.

    Raises UserError for unknown chips and kernels and if nothing can be compiled, and Failure if a
    process does not finish.
    """
    # 1. Check the arguments.
    target = _target(chip)
    if (why := deviceless.refusal()) is not None:
        raise UserError(f"kernels check: {why}")
    chosen = _chosen(chip, names)
    # 2. Compile and interpret.
    begin = ticks or (lambda text: lambda done, total: None)
    compiled = compile_kernels(target, chosen, begin("compiling"), timeout)
    tests: dict[str, bool | str] = dict.fromkeys(chosen, "not requested")
    if interpret:
        tests = run_interpreter_tests(chosen, begin("interpreting"), timeout)
    return [
        _row(name, chip, compiled[name], tests[name], executed_on(name, chip)) for name in chosen
    ]


def _target(chip: str) -> str:
    if chip not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise UserError(f"--chip: {chip!r}; choose {known}{nearest(chip, ARCHITECTURES)}")
    return ARCHITECTURES[chip]


def _chosen(chip: str, names: Sequence[str] | None) -> list[str]:
    from pallas_kernels.catalog import catalog

    known = {name: x for name, x in catalog().items() if chip in x.chips}
    for name in names or ():
        if name not in known:
            raise UserError(f"kernels check: no kernel {name!r} for {chip}{nearest(name, known)}")
    return list(names or known)


def _row(name: str, chip: str, report: dict, ran: bool | str, device: str | None) -> dict:
    """One row for the kernels that a catalog entry launches: sums, or maxima.

    `ran` is whether the test in the interpreter passed, or the reason why it did not run.
    """
    kernels = report.get("compiled", [])
    counts: collections.Counter[str] = collections.Counter()
    for kernel in kernels:
        counts.update(kernel["instructions"])

    def most(key: str) -> int | None:
        return max((kernel[key] for kernel in kernels), default=None)

    spilled = sum(kernel["spilled_bytes"] for kernel in kernels)
    row = {
        "kernel": name,
        "chip": chip,
        "instructions": dict(counts),
        "spill_bytes": spilled if kernels else None,
        "registers": most("registers"),
        "smem_bytes": most("shared_bytes"),
        "tensor_columns": most("tensor_columns"),
        **_counted(name, chip, [kernel.get("facts") for kernel in kernels]),
        "interpreted": None if isinstance(ran, str) else ran,
        "not_run": ran if isinstance(ran, str) else None,
        "compiled": bool(kernels) and all(k["architecture"] == chip for k in kernels),
        "executed_on": device,
    }
    return row | {"failures": _failures(row, report, kernels)}


def _counted(name: str, chip: str, facts: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Registers, and cycles of a step by cause; None where nothing was counted or modelled.

    The registers are those of the kernel that comes closest to its pool; of several, the one that
    asks for most. Cycles are sums over the kernels that the share refers to.
    """
    known = [x for x in facts if x is not None]
    tightest = max(
        known,
        key=lambda x: (x["registers_asked"] - x["register_pool"], x["registers_asked"]),
        default=None,
    )
    registers = {key: tightest and tightest[key] for key in ("register_pool", "registers_asked")}
    least = 3 if name.startswith(kernel_model.GRADIENTS) else 2
    steps = [
        kernel_model.step_cycles(x, chip, products=least)
        for x in kernel_model.modelled(name, facts)
        if kernel_model.has_products(x)
    ]
    cycles = {key: round(sum(s[key] for s in steps)) if steps else None for key in CYCLES}
    share = kernel_model.model_share(name, facts, chip)
    return registers | cycles | {"model_share": None if share is None else round(share, 3)}


def _failures(row: dict[str, Any], report: dict[str, Any], kernels: list[dict]) -> list[str]:
    """Why a kernel is not fit to run, in words. What was not run is no failure."""
    if not kernels:
        return [report.get("failure") or "compiled for nothing"]
    problems = {text: None for k in kernels for text in violations(row["kernel"], k, row["chip"])}
    if row["interpreted"] is False:
        problems["its test in the interpreter fails"] = None
    return list(problems)


def compile_kernels(
    target: str, names: list[str], tick: Tick, timeout: float = TIMEOUT
) -> dict[str, dict[str, Any]]:
    """The compilers' report on each kernel, or {"failure": message}."""
    command = [sys.executable, "-m", "longlive_jax.bench.kernels_compile", target]
    reports = {name: {"failure": "the compiler exited without a message"} for name in names}
    tick(0, len(names))
    for done, name in enumerate(names, 1):
        for line in process_lines([*command, name], ROOT, timeout):
            if line.startswith(PREFIX):
                reports[name] = json.loads(line.removeprefix(PREFIX))
        tick(done, len(names))
    return reports


def interpreter_tests() -> dict[str, str]:
    """Kernel -> its test, for kernels that the interpreter can run."""
    from pallas_kernels.catalog import catalog

    return {x.name: f"{TEST}[{x.name}]" for x in catalog().values() if x.not_interpreted is None}


def run_interpreter_tests(
    names: list[str], tick: Tick, timeout: float = TIMEOUT
) -> dict[str, bool | str]:
    """Whether each kernel's test passes, or the reason in words why it did not run."""
    # 1. Leave out what cannot run.
    from pallas_kernels.catalog import catalog

    known = interpreter_tests()
    results: dict[str, bool | str] = {
        name: f"the interpreter cannot run it: {catalog()[name].not_interpreted}"
        for name in names
        if name not in known
    }
    tests = sorted({known[name] for name in names if name in known})
    if (why := _no_tests(tests)) is not None:
        return results | {name: why for name in names if name in known}
    # 2. Run the others.
    command = [sys.executable, "-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider"]
    outcomes: dict[str, str] = {}
    tick(0, len(tests))
    for line in process_lines([*command, *tests], ROOT, timeout) if tests else ():
        test = next((test for test in tests if line.startswith(f"{test} ")), None)
        if test is not None:
            outcomes[test] = line.removeprefix(test).split()[0]
            tick(len(outcomes), len(tests))
    return results | {name: _verdict(outcomes.get(known[name])) for name in names if name in known}


def _no_tests(tests: Sequence[str]) -> str | None:
    """Why no test can run here, or None if they can."""
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed"
    if not all((ROOT / test.partition("::")[0]).is_file() for test in tests):
        return "the tests are not part of this installation"
    return None


def _verdict(outcome: str | None) -> bool | str:
    """A test passed or failed; any other outcome is no verdict."""
    if outcome in ("PASSED", "FAILED"):
        return outcome == "PASSED"
    return "pytest could not collect it" if outcome is None else f"pytest: {outcome.lower()}"


def process_lines(command: list[str], folder: Path, timeout: float = TIMEOUT) -> Iterator[str]:
    """Yields the output lines of a process; raises Failure if it is killed or takes too long."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=folder,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    late = threading.Timer(timeout, process.kill)
    late.start()
    try:
        assert process.stdout is not None
        yield from process.stdout
        if process.wait() < 0:
            raise Failure(f"kernels check: a process was killed (the timeout is {timeout:.0f} s)")
    finally:
        late.cancel()
        process.kill()
        process.wait()


def executed_on(name: str, chip: str, folder: Path = RESULTS) -> str | None:
    """The device that a kernel has run on, or None.

    It is read from `kernels_*.json` in `folder`: lists of rows with kernel, chip and executed_on.
    """
    for file in sorted(folder.glob("kernels_*.json")):
        for row in json.loads(file.read_text()):
            if (row["kernel"], row["chip"]) == (name, chip) and row.get("executed_on"):
                return str(row["executed_on"])
    return None
