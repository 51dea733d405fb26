"""Compiles kernels of the catalog for a GPU that need not be present, in a separate process.

`longlive_jax.bench.kernels` runs this module with the name of a chip and the names of kernels. It
prints one line per kernel as soon as it is compiled. JAX must not be imported before `prepare`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from longlive_jax.planning import deviceless

PREFIX = "KERNEL "


def main(argv: list[str]) -> int:
    """Arguments are `CHIP KERNEL...`, with a chip of `planning.chips`."""
    chip, *names = argv
    dump = deviceless.prepare()
    for name in names:
        try:
            report = _compile(chip, name, dump)
        except Exception as error:  # the caller shows any error as one line
            report = {"failure": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
        print(PREFIX + json.dumps({"kernel": name} | report), flush=True)
        for file in dump.iterdir():
            file.unlink()
    return 0


def _compile(chip: str, name: str, dump: Path) -> dict[str, Any]:
    from pallas_kernels.catalog import catalog

    entry = catalog()[name]
    run, arguments = entry.build()
    deviceless.compile_for(chip, run, *arguments)
    return {"compiled": deviceless.inspect(dump, *entry.instructions)}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
