"""Reads the descriptors of a kernel's bulk copies (TMA) from the dump of Mosaic's compiler.

A descriptor names an array in global memory and the box of it that one copy moves. The driver
refuses a descriptor that breaks a rule of the hardware, at the first launch and not earlier.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

MOST_DIMENSIONS, LARGEST_BOX, ALIGNMENT = 5, 256, 16
"""Rules of cuTensorMapEncodeTiled (CUDA driver API): dimensions, elements of a box's side, and
bytes that divide the array's strides and the inner side of the box."""
NO_SWIZZLE = 16
"""Mosaic's number for a copy without swizzle; others are the bytes of a swizzled row."""

_VALUE = re.compile(r"(%[\w#]+) = arith\.constant (-?\d+) : i64")
_ALLOCATION = re.compile(r"llvm\.getelementptr (%\w+)\[(\d+)\]")
_ARRAY = re.compile(
    r"extract_strided_metadata %\w+ : memref<([\dx]+)x(\w+)(?:, strided<\[([^\]]*)\])?"
)


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """What one kind of copy moves.

    Attributes:
      bits: size of an element.
      shape: dimensions of the array.
      strides: their strides in elements; None where they are known only at run time.
      box: dimensions of the box.
      swizzle: bytes of a swizzled row of shared memory, or NO_SWIZZLE.
    """

    bits: int
    shape: tuple[int, ...]
    strides: tuple[int | None, ...]
    box: tuple[int, ...]
    swizzle: int

    def violations(self) -> list[str]:
        """The rules that the descriptor breaks, in words."""
        inner = self.box[-1] * self.bits // 8
        outer = zip(self.shape[:-1], self.strides[:-1], strict=True)
        rows = [stride * self.bits / 8 for size, stride in outer if size > 1 and stride is not None]
        problems = []
        if len(self.box) > MOST_DIMENSIONS:
            problems.append(f"{len(self.box)} dimensions")
        if max(self.box) > LARGEST_BOX:
            problems.append(f"a box of {max(self.box)} elements")
        if inner % ALIGNMENT:
            problems.append(f"an inner box of {inner} bytes")
        if any(row % ALIGNMENT for row in rows):
            problems.append(f"a stride that {ALIGNMENT} bytes do not divide")
        if self.swizzle != NO_SWIZZLE and inner > self.swizzle:
            problems.append(f"an inner box of {inner} bytes in swizzled rows of {self.swizzle}")
        return [f"a TMA copy has {problem}" for problem in problems]


def descriptors(log: Path) -> tuple[Descriptor, ...]:
    """The descriptors that the host part of a kernel sets up, in order.

    Args:
      log: the `.mlir-passes.log` of a dump; only the module before the first pass is read.
    """
    return tuple(_descriptors(log))


def _descriptors(log: Path) -> Iterator[Descriptor]:
    numbers: dict[str, int] = {}
    stores: dict[str, list[str]] = {}
    address: tuple[str, int] | None = None
    array: re.Match | None = None
    with log.open(errors="replace") as lines:
        for line in itertools.islice(_first_module(lines), 200_000):
            if value := _VALUE.search(line):
                numbers[value[1]] = int(value[2])
            elif metadata := _ARRAY.search(line):
                array = metadata
            elif pointer := _ALLOCATION.search(line):
                address = pointer[1], int(pointer[2])
            elif (stored := re.search(r"llvm\.store (%[\w#]+),", line)) and address:
                stores.setdefault(address[0], []).append(stored[1])
            elif (call := re.search(r"call @mosaic_gpu_init_tma_desc\(([^)]*)\)", line)) and array:
                arguments = call[1].split(", ")
                box = tuple(numbers[name] for name in stores[arguments[7]])
                yield _descriptor(array, box, numbers[arguments[6]])


def _first_module(lines: Iterator[str]) -> Iterator[str]:
    yield next(lines, "")
    yield from itertools.takewhile(lambda line: "IR Dump Before" not in line, lines)


def _descriptor(array: re.Match, box: tuple[int, ...], swizzle: int) -> Descriptor:
    shape = tuple(int(size) for size in array[1].split("x"))
    if array[3] is None:
        after = [*itertools.accumulate(reversed(shape), lambda a, b: a * b)]
        strides: tuple[int | None, ...] = (*reversed(after[:-1]), 1)
    else:
        strides = tuple(None if s.strip() == "?" else int(s) for s in array[3].split(","))
    bits = re.match(r"[a-z]+(\d+)", array[2])
    return Descriptor(int(bits[1]) if bits else 32, shape, strides, box, swizzle)
