"""The state of every Pallas kernel: interpreted, compiled for a chip, run on a GPU.

Compilation needs no GPU and reports a kernel's instructions, registers, spills and shared memory.
Interpretation runs the tests that compare a kernel with its reference and detect races. Whether a
kernel has run on a GPU is read from recorded results.
"""

import collections
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from longlive_jax.bench.kernels_compile import PREFIX
from longlive_jax.planning import deviceless
from longlive_jax.spec import Failure, UserError, nearest

ARCHITECTURES = {"sm_100a": "gb200", "sm_90a": "h200"}
"""Architecture -> a chip of it in `planning.chips`."""
ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results")
TIMEOUT = 1800
"""Seconds after which a process is killed."""

_ATTENTION = (
    "tests/pallas_kernels/test_attention_mosaic.py"
    "::test_values_and_gradients_are_those_of_the_oracle[window and sinks-"
)
_MATMUL = "tests/pallas_kernels/nvfp4/test_matmul_mosaic.py::test_it_equals_the_oracle["
_QUANTIZE = "tests/pallas_kernels/nvfp4/test_mosaic_quantize.py::test_it_equals_the_oracle["
_BOTH = "tests/pallas_kernels/nvfp4/test_mosaic_quantize.py::test_both_in_one_pass["
_DEQUANTIZE = "tests/pallas_kernels/nvfp4/test_mosaic_dequantize.py::test_"
INTERPRETED_BY = {
    "attention_forward_hopper": f"{_ATTENTION}Hopper]",
    "attention_gradients_hopper": f"{_ATTENTION}Hopper]",
    "attention_forward_blackwell": f"{_ATTENTION}Blackwell]",
    "attention_gradients_blackwell": f"{_ATTENTION}Blackwell]",
    "attention_packed": (
        "tests/pallas_kernels/test_attention_packed.py::test_the_kernel_equals_the_oracle"
    ),
    "nvfp4_quantize": f"{_QUANTIZE}mse]",
    "nvfp4_quantize_static": f"{_QUANTIZE}static_6]",
    "nvfp4_quantize_stochastic": f"{_QUANTIZE}stochastic]",
    "nvfp4_quantize_rotated": f"{_QUANTIZE}rotated]",
    "nvfp4_quantize_transposed": f"{_QUANTIZE}transposed]",
    "nvfp4_quantize_both": f"{_BOTH}nearest]",
    "nvfp4_quantize_both_stochastic": f"{_BOTH}stochastic]",
    "nvfp4_quantize_squares": f"{_QUANTIZE}squares]",
    "nvfp4_dequantize": f"{_DEQUANTIZE}it_equals_the_oracle[bfloat16]",
    "nvfp4_dequantize_slots": f"{_DEQUANTIZE}only_listed_slots_are_read",
    "nvfp4_matmul": f"{_MATMUL}more steps than stages, shared columns]",
}
"""Kernel -> the test that compares it with its reference in the interpreter and detects races.
The interpreter does not support pairs of multiprocessors, so kernels that use pairs have none."""

Tick = Callable[[int, int], None]
"""Progress callback, called with (done, total)."""


def check(
    chip: str, names: Sequence[str] | None = None, *, interpret: bool = True, ticks: Any = None
) -> list[dict[str, Any]]:
    """Checks the kernels of a chip ("sm_100a"), or only the named ones; returns one row each.

    A row has the keys kernel, chip, instructions (name -> count), spill_bytes, registers,
    smem_bytes, tensor_columns, interpreted (None if not requested or if the tests are missing),
    compiled, executed_on (name of a device, or None) and failures (messages).

    Args:
      chip: architecture, a key of `ARCHITECTURES`.
      names: kernels to check; None for all of the chip.
      interpret: whether to run the interpreter tests.
      ticks: `ticks(text)` returns a progress callback (done, total) for a phase of the work.

    Raises UserError for unknown chips and kernels and if nothing can be compiled, and Failure if a
    process does not finish.
    """
    # 1. Check the arguments.
    target = _target(chip)
    if (why := deviceless.refusal()) is not None:
        raise UserError(f"kernels check: {why}")
    from pallas_kernels.catalog import catalog

    known = {name: x for name, x in catalog().items() if chip in x.chips}
    for name in names or ():
        if name not in known:
            raise UserError(f"kernels check: no kernel {name!r} for {chip}{nearest(name, known)}")
    chosen = list(names or known)
    # 2. Compile and interpret.
    begin = ticks or (lambda text: lambda done, total: None)
    compiled = compile_kernels(target, chosen, begin("compiling"))
    tests = run_interpreter_tests(chosen, begin("interpreting")) if interpret else {}
    return [
        _row(name, chip, compiled[name], tests.get(name), executed_on(name, chip))
        for name in chosen
    ]


def _target(chip: str) -> str:
    if chip not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise UserError(f"--chip: {chip!r}; choose {known}{nearest(chip, ARCHITECTURES)}")
    return ARCHITECTURES[chip]


def _row(name: str, chip: str, report: dict, interpreted: bool | None, device: str | None) -> dict:
    """One row for the kernels that a catalog entry launches: sums, or maxima."""
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
        "interpreted": interpreted,
        "compiled": bool(kernels) and all(k["architecture"] == chip for k in kernels),
        "executed_on": device,
    }
    return row | {"failures": _failures(row, report, kernels)}


def _failures(row: dict[str, Any], report: dict[str, Any], kernels: list[dict]) -> list[str]:
    if not row["compiled"]:
        built = ", ".join(kernel["architecture"] for kernel in kernels)
        return [report.get("failure") or f"compiled for {built or 'nothing'}"]
    failures = []
    if row["spill_bytes"]:
        failures.append(f"{row['spill_bytes']} bytes of registers spill")
    if lacking := sorted({pattern for kernel in kernels for pattern in kernel["lacking"]}):
        failures.append(f"instructions it is written for are missing: {', '.join(lacking)}")
    if row["smem_bytes"] > deviceless.SHARED_MEMORY:
        failures.append(f"{row['smem_bytes']} bytes of shared memory")
    if row["tensor_columns"] > deviceless.TENSOR_COLUMNS:
        failures.append(f"{row['tensor_columns']} columns of tensor memory")
    if row["interpreted"] is False and row["kernel"] in INTERPRETED_BY:
        failures.append("its test in the interpreter fails")
    return failures


def compile_kernels(target: str, names: list[str], tick: Tick) -> dict[str, dict[str, Any]]:
    """The compilers' report on each kernel, or {"failure": message}."""
    command = [sys.executable, "-m", "longlive_jax.bench.kernels_compile", target]
    reports = {name: {"failure": "the compiler exited without a message"} for name in names}
    tick(0, len(names))
    for done, name in enumerate(names, 1):
        for line in process_lines([*command, name], ROOT):
            if line.startswith(PREFIX):
                reports[name] = json.loads(line.removeprefix(PREFIX))
        tick(done, len(names))
    return reports


def run_interpreter_tests(names: list[str], tick: Tick) -> dict[str, bool | None]:
    """Whether each kernel's test passes; None if the tests are not installed, False without one."""
    tests = sorted({INTERPRETED_BY[name] for name in names if name in INTERPRETED_BY})
    if not all((ROOT / test.partition("::")[0]).is_file() for test in tests):
        return dict.fromkeys(names)
    command = [sys.executable, "-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider"]
    passed, done = set(), 0
    tick(0, len(tests))
    for line in process_lines([*command, *tests], ROOT) if tests else ():
        ended = next((test for test in tests if line.startswith(f"{test} ")), None)
        if ended is not None:
            done += 1
            tick(done, len(tests))
            passed |= {ended} if " PASSED" in line else set()
    return {name: INTERPRETED_BY.get(name) in passed for name in names}


def process_lines(command: list[str], folder: Path) -> Iterator[str]:
    """Yields the output lines of a process; raises Failure if it is killed or takes too long."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=folder,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    late = threading.Timer(TIMEOUT, process.kill)
    late.start()
    try:
        assert process.stdout is not None
        yield from process.stdout
        if process.wait() < 0:
            raise Failure(f"kernels check: a process was killed (the timeout is {TIMEOUT} s)")
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
