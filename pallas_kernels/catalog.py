"""The catalog of all Mosaic kernels: the records of `pallas_kernels/*/mosaic/records.py`.

A kernel is "interpreted" (compared with its oracle in Pallas' interpreter, which also detects
races), "compiled" (for a chip that need not be present) or "run" (on such a chip).
"""

import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from pallas_kernels.kernel import CHIPS, Kernel

ROOT = Path(__file__).parent


@functools.cache
def catalog() -> Mapping[str, Kernel]:
    """All records by name. Importing them takes about 0.5 s."""
    kernels: dict[str, Kernel] = {}
    for path in sorted(ROOT.glob("*/mosaic/records.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for kernel in importlib.import_module(f"pallas_kernels.{name}").KERNELS:
            if kernel.name in kernels:
                raise ValueError(f"two kernels are named {kernel.name!r}")
            kernels[kernel.name] = kernel
    return MappingProxyType(kernels)


def kernels_of(op: str, capability: str | None = None) -> tuple[Kernel, ...]:
    """The records of an operation, in order; only those for a compute capability ("9.0") if given.

    The first is the general form; others fix some of its options.
    """
    chip = None if capability is None else CHIPS.get(capability)
    every = (kernel for kernel in catalog().values() if kernel.op == op)
    return tuple(k for k in every if capability is None or chip in k.chips)
