"""Reads the text of a compiled HLO module: computations, what they call, sizes of types."""

import math
import re
from collections.abc import Iterator

__all__ = ["bits", "callees", "computations", "result_shapes", "size"]

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f4e2m1fn": 4}
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_WHILE = re.compile(r" while\(.*body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLS = re.compile(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


def computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Lines of every computation by its name, and the name of the entry computation."""
    bodies: dict[str, list[str]] = {}
    entry, body = "", None
    for line in hlo.splitlines():
        if not line.startswith(" "):
            header = _COMPUTATION.match(line)
            body = None if header is None else bodies.setdefault(header[1], [])
            if header is not None and line.startswith("ENTRY"):
                entry = header[1]
        elif body is not None:
            body.append(line)
    return bodies, entry


def callees(line: str) -> Iterator[tuple[int | None, str]]:
    """(number of runs, name) of the computations an instruction calls; None: unknown number."""
    if (loop := _WHILE.search(line)) is not None:
        trips = _TRIPS.search(line)
        yield (None if trips is None else int(trips[1])), loop[1]
        return
    for name in _CALLS.findall(line):
        yield 1, name
    for names in _BRANCHES.findall(line):
        for name in names.split(","):
            yield 1, name.strip().lstrip("%")


def result_shapes(text: str) -> list[tuple[int, ...]]:
    """Shapes of the arrays in a type."""
    return [tuple(int(n) for n in shape.split(",") if n) for _, shape in _ARRAY.findall(text)]


def size(text: str) -> int:
    """Total bytes of the arrays in a type."""
    return sum(
        bits(name) * math.prod(int(n) for n in shape.split(",") if n) // 8
        for name, shape in _ARRAY.findall(text)
    )


def bits(name: str) -> int:
    """Bits of one element of an HLO type."""
    if name in _BITS:
        return _BITS[name]
    width = re.match(r"(?:f8|[a-z]+(\d+))", name)
    if width is None:
        raise ValueError(f"unknown type {name!r} in HLO")
    return int(width[1] or 8)
