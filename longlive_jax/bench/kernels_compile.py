"""Compiles kernels of the catalog for a GPU that is not here, in a process of its own.

`longlive_jax.bench.kernels` runs this module with a chip's name and those of kernels; it prints one
line a kernel, as soon as that is done. Nothing may import JAX before `prepare`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from longlive_jax.planning import deviceless

PREFIX = "KERNEL "


def main(argv: list[str]) -> int:
    """`CHIP KERNEL...`, the chip as in `bench.chips`."""
    chip, *names = argv
    dump = deviceless.prepare()
    for name in names:
        try:
            found = _compiled(chip, name, dump)
        except Exception as error:  # whatever it is, the caller shows it as one line
            found = {"failure": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
        print(PREFIX + json.dumps({"kernel": name} | found), flush=True)
        for file in dump.iterdir():
            file.unlink()
    return 0


def _compiled(chip: str, name: str, dump: Path) -> dict[str, Any]:
    from pallas_kernels.catalog import catalog

    entry = catalog()[name]
    run, arguments = entry.build()
    deviceless.compile_for(chip, run, *arguments)
    return {"compiled": deviceless.inspect(dump, *entry.instructions)}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
