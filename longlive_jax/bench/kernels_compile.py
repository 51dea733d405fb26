"""Compiles one kernel of the catalog for a GPU that need not be present.

`longlive_jax.bench.kernels` runs this module with the name of a chip and of a kernel, and reads
the printed line. Each kernel has its own process: JAX must not be imported before `prepare`, and
JAX 0.12 numbers dumped files wrongly after a process compiles the same function twice.
"""

import json
import sys
from pathlib import Path
from typing import Any

from longlive_jax.planning import deviceless

PREFIX = "KERNEL "


def main(argv: list[str]) -> int:
    """Arguments are `CHIP KERNEL`, with a chip of `planning.chips`."""
    chip, name = argv
    dump = deviceless.prepare()
    try:
        report = _compile(chip, name, dump)
    except Exception as error:  # the caller shows any error as one line
        report = {"failure": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
    print(PREFIX + json.dumps(report), flush=True)
    return 0


def _compile(chip: str, name: str, dump: Path) -> dict[str, Any]:
    from pallas_kernels.catalog import catalog

    entry = catalog()[name]
    run, arguments = entry.build()
    deviceless.compile_for(chip, run, *arguments)
    return {"compiled": deviceless.inspect(dump, *entry.instructions)}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
