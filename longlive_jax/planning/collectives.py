"""What a compiled program sends between devices, counted from its HLO text.

Loops count as often as they run. Bytes are those that one device sends by the usual ring (or direct
exchange) among the `n` devices of its group: (n - 1) / n of the whole array for an all-gather, a
reduce-scatter and an all-to-all, twice that for an all-reduce, all of it for a permutation.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

__all__ = ["KINDS", "Traffic", "traffic"]

KINDS = ("all-gather", "reduce-scatter", "all-to-all", "all-reduce", "collective-permute")

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f4e2m1fn": 4}
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_WHILE = re.compile(r" while\(.*body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLS = re.compile(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one kind: operations a device takes part in, and bytes that it sends."""

    count: int = 0
    bytes: float = 0.0


def traffic(hlo: str, devices: int) -> dict[str, Traffic]:
    """By kind, in one run of a compiled program of so many devices; kinds that it lacks too.

    Raises ValueError if a loop that sends something does not say how often it runs, or a line
    cannot be read.
    """
    bodies, entry = _bodies(hlo)

    @functools.cache
    def of(name: str) -> Mapping[str, Traffic]:
        total: dict[str, int] = collections.defaultdict(int)
        sent: dict[str, float] = collections.defaultdict(float)
        for line in bodies.get(name, ()):
            for times, inner in _inner(line):
                for kind, found in of(inner).items():
                    if times is None:
                        raise ValueError(f"a loop of unknown length holds an {kind}: {inner}")
                    total[kind] += times * found.count
                    sent[kind] += times * found.bytes
            if (own := _COLLECTIVE.search(line)) is not None:
                total[own[2]] += 1
                sent[own[2]] += _sent(own[2], own[1], bool(own[3]), line, devices)
        return {kind: Traffic(total[kind], sent[kind]) for kind in total}

    found = of(entry)
    return {kind: found.get(kind, Traffic()) for kind in KINDS}


def _bodies(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Lines by computation, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    entry, here = "", None
    for line in hlo.splitlines():
        if not line.startswith(" "):
            begins = _COMPUTATION.match(line)
            here = None if begins is None else bodies.setdefault(begins[1], [])
            if begins is not None and line.startswith("ENTRY"):
                entry = begins[1]
        elif here is not None:
            here.append(line)
    return bodies, entry


def _inner(line: str) -> Iterator[tuple[int | None, str]]:
    """Computations that an instruction runs, and how often; None: it does not say."""
    if (loop := _WHILE.search(line)) is not None:
        trips = _TRIPS.search(line)
        yield (None if trips is None else int(trips[1])), loop[1]
        return
    for name in _CALLS.findall(line):
        yield 1, name
    for names in _BRANCHES.findall(line):
        for name in names.split(","):
            yield 1, name.strip().lstrip("%")


def _sent(kind: str, result: str, starts: bool, line: str, devices: int) -> float:
    """Bytes that a device sends for one operation."""
    if kind == "collective-permute":
        return _size(_results(result) if starts else result)
    group = _group(line, devices)
    whole = float(_size(_results(result) if starts else result))
    if kind == "reduce-scatter":
        whole *= group
    return whole * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def _results(text: str) -> str:
    """The second half of `((operands), results)`, which the start of an operation gives."""
    depth, parts, begin = 0, [], 1
    for i, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            parts.append(text[begin:i])
            begin = i + 1
    return parts[1] if len(parts) > 1 and text.startswith("((") else text


def _size(text: str) -> int:
    """Bytes of all arrays in a type."""
    return sum(
        _bits(name) * math.prod(int(n) for n in shape.split(",") if n) // 8
        for name, shape in _ARRAY.findall(text)
    )


def _bits(name: str) -> int:
    if name in _BITS:
        return _BITS[name]
    width = re.match(r"(?:f8|[a-z]+(\d+))", name)
    if width is None:
        raise ValueError(f"unknown type {name!r} in HLO")
    return int(width[1] or 8)


def _group(line: str, devices: int) -> int:
    """Devices that exchange with each other."""
    if (axes := _AXES.search(line)) is not None:
        sizes = dict(part.split("=") for part in axes[1].replace("'", "").split(","))
        names = [name.strip() for name in axes[2].replace("'", "").split(",")]
        return math.prod(int(sizes[name]) for name in names)
    if (listed := _LISTED.search(line)) is not None:
        return len(listed[1].split(","))
    if (iota := _IOTA.search(line)) is not None:
        return int(iota[1])
    if "replica_groups={}" in line:
        return devices
    raise ValueError(f"no groups of devices in {line.strip()[:120]!r}")
