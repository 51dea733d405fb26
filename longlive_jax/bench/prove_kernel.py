"""Proves one kernel on this machine's GPU, in a process of its own.

`longlive_jax.bench.prove` runs this module with the name of a kernel, and perhaps `--tune`, and
reads the printed lines: one when a phase begins and one with its result. A hang is therefore known
by its phase. Without a name it prints the device.
"""

import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from longlive_jax.bench.prove_peers import outside, peers
from longlive_jax.bench.timing import repeated
from longlive_jax.planning.chips import CHIPS, Chip
from pallas_kernels import tuned
from pallas_kernels.digest import source_digest
from pallas_kernels.dispatch import device_kind
from pallas_kernels.kernel import Cost, Kernel, bind, error

PREFIX = "PROVE "
RUNS = 20
"""Runs at production sizes, all of which must give the same bits."""
CALLS, REPEATS = 5, 7
"""Calls per measurement without waiting in between, and measurements."""
SLOW = 0.05
"""Seconds of a call that is measured less often."""
CANARIES = ("one tile", "one block", "one program", "one group of rows", "one slot", "one row")
EMPTY_CANARIES = ("no keys", "no past keys", "all zero", "no slots listed")
BLIND_CANARIES = ("blind query tile", "NaN in a row", "NaN in slots that are not listed")
"""Cases that run before anything large: a tile, none, and one that sees nothing."""
Emit = Callable[[dict[str, Any]], None]


class Wrong(RuntimeError):
    """A kernel gave a wrong result; the message says which."""


def main(argv: list[str]) -> int:
    """Prints the lines of a kernel, or that of the device."""
    if not argv:
        device = jax.local_devices()[0]
        capability = str(getattr(device, "compute_capability", ""))
        emit({"device": device.device_kind, "capability": capability, "platform": device.platform})
        return 0
    from pallas_kernels.catalog import catalog

    try:
        prove_kernel(catalog()[argv[0]], emit, tune="--tune" in argv)
    except Exception as problem:  # the caller shows any error as one line
        text = (
            str(problem) if isinstance(problem, Wrong) else f"{type(problem).__name__}: {problem}"
        )
        emit({"failure": (text.strip().splitlines() or [type(problem).__name__])[0][:300]})
        return 1
    return 0


def emit(findings: dict[str, Any]) -> None:
    """Prints a line for the parent process."""
    print(PREFIX + json.dumps(findings), flush=True)


def prove_kernel(kernel: Kernel, emit: Emit, *, tune: bool = False) -> None:
    """Runs all phases of a kernel on the default device. Raises `Wrong` for a wrong result."""
    tiles = tuned.tiles(kernel.name, device_kind())
    # 1. Small inputs first: if they hang, nothing else is worth starting.
    emit({"phase": "canaries"})
    for case in canaries(kernel):
        check(kernel, case.build(), case.name, tiles)
    emit({"canaries": [case.name for case in canaries(kernel)]})
    # 2. The faster tile sizes, each compared with the oracle before it is timed.
    emit({"phase": "numbers"})
    arguments = kernel.production()
    want = jax.block_until_ready(jitted(kernel.oracle, arguments)())
    if tune and kernel.tiles:
        emit({"phase": "tiles"})
        tiles, tried = search(kernel, arguments, want, tiles)
        emit({"tried": tried, "phase": "numbers"})
    # 3. Numbers, and the same bits in every run.
    run = jitted(kernel.run, arguments, **tiles)
    emit({"error": compared(kernel, run(), want, "production")} | {"tiles": tiles})
    emit({"equal_runs": equal_runs(run)})
    # 4. Times, of the kernel and of its peers.
    emit({"phase": "times"})
    seconds = timed(run)
    least = limit(kernel.cost(*arguments), chip_of(device_kind()))
    emit({"seconds": seconds, "limit_seconds": least, "share": least and least / seconds})
    emit({"peers": time_peers(kernel, arguments), "automatic": _automatic(kernel, arguments)})
    emit({"proven": True, "digest": source_digest(kernel.modules)})


def canaries(kernel: Kernel) -> list[Any]:
    """Up to three cases: a tile, none, and one that sees nothing."""
    by_name = {case.name: case for case in kernel.cases}
    kinds = (CANARIES, EMPTY_CANARIES, BLIND_CANARIES)
    findings = [next((by_name[n] for n in names if n in by_name), None) for names in kinds]
    return [case for case in findings if case is not None] or list(kernel.cases[:3])


def check(kernel: Kernel, arguments: tuple, name: str, tiles: dict[str, Any]) -> None:
    """Raises `Wrong` if the kernel differs from its oracle."""
    got, want = jitted(kernel.run, arguments, **tiles)(), jitted(kernel.oracle, arguments)()
    compared(kernel, got, want, name)


def compared(kernel: Kernel, got: Any, want: Any, name: str) -> float:
    """The error relative to the oracle; raises `Wrong` above the kernel's tolerance."""
    off = error(got, want)
    if not off <= kernel.device_tolerance:
        most = kernel.device_tolerance
        raise Wrong(f"{name}: {off:.1e} from the oracle, at most {most:.1e}")
    return off


def equal_runs(run: Callable[[], Any]) -> int:
    """The number of runs, all with the same bits; raises `Wrong` if one differs."""
    first = _bits(run())
    for i in range(1, RUNS):
        if _bits(run()) != first:
            raise Wrong(f"run {i + 1} of {RUNS} on the same input gave other bits")
    return RUNS


def _bits(result: Any) -> list[bytes]:
    return [np.asarray(jax.device_get(x)).tobytes() for x in jax.tree.leaves(result)]


def jitted(function: Callable, arguments: tuple, **options: Any) -> Callable[[], Any]:
    """A call without arguments; it does not wait for its results."""
    call, arrays = bind(function, arguments, **options)
    compiled = jax.jit(call)
    return lambda: compiled(*arrays)


def timed(run: Callable[[], Any]) -> float:
    """Median seconds of a call; a slow one is not queued several times."""
    least = repeated(run, 1)["least"]
    calls, repeats = (CALLS, REPEATS) if least < SLOW else (1, 3)
    return float(repeated(lambda: [run() for _ in range(calls)], repeats)["median"]) / calls


def time_peers(kernel: Kernel, arguments: tuple) -> dict[str, Any]:
    """Peer -> seconds, or the reason why it was not timed."""
    times: dict[str, Any] = outside(kernel)
    for peer in peers(kernel, arguments):
        try:
            call, arrays = peer.call()
            times[peer.name] = timed(jitted(call, arrays))
        except Exception as reason:  # another library's error is a reason, not a failure
            text = str(reason).strip() or type(reason).__name__
            times[peer.name] = text.splitlines()[0][:200]
    return times


def _automatic(kernel: Kernel, arguments: tuple) -> list[str]:
    return [peer.name for peer in peers(kernel, arguments) if peer.automatic]


def search(
    kernel: Kernel, arguments: tuple, want: Any, tiles: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the fastest tile sizes whose result is right, what was tried).

    The present tile sizes stay if no others are faster.
    """
    best = dict(tiles)
    tried: list[dict[str, Any]] = []
    least = timed(jitted(kernel.run, arguments, **tiles))
    for values in itertools.product(*kernel.tiles.values()):
        chosen = dict(zip(kernel.tiles, values, strict=True))
        try:
            run = jitted(kernel.run, arguments, **chosen)
            compared(kernel, run(), want, "production")
            seconds = timed(run)
        except Exception as problem:  # tile sizes that do not fit the chip are an answer too
            tried.append({"tiles": chosen, "failure": str(problem).strip().splitlines()[:1]})
            continue
        tried.append({"tiles": chosen, "seconds": seconds})
        if seconds < least:
            best, least = chosen, seconds
    return best, tried


def chip_of(device: str) -> Chip | None:
    """The data sheet of a device kind, or None."""
    return next((chip for chip in CHIPS.values() if device.startswith(chip.name)), None)


def limit(cost: Cost, chip: Chip | None) -> float | None:
    """The least seconds by the data sheet: of memory, products or exponentials."""
    if chip is None:
        return None
    rate = chip.bf16_flops * (4 if cost.flops_format == "nvfp4" else 1)
    exponentials = 16 * chip.multiprocessors * chip.clock_ghz * 1e9
    return max(
        cost.bytes / chip.memory_bandwidth, cost.flops / rate, cost.exponentials / exponentials
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
