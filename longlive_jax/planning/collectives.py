"""Communication volume of a compiled program, counted from its HLO text.

An operation inside a loop counts once per iteration. Bytes are what one device sends, assuming the
usual ring (or direct) algorithm in a group of `n` devices: (n - 1) / n of the full array for an
all-gather, a reduce-scatter and an all-to-all, twice that for an all-reduce, and the full array for
a collective permute.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping

from longlive_jax.planning.hlo import callees, computations, size

__all__ = ["KINDS", "Traffic", "traffic"]

KINDS = ("all-gather", "reduce-scatter", "all-to-all", "all-reduce", "collective-permute")
"""Collective operations that are counted."""

_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Traffic of one device by collectives of one kind.

    Attributes:
      count: number of operations that the device takes part in.
      bytes: bytes that it sends for them.
    """

    count: int = 0
    bytes: float = 0.0


def traffic(hlo: str, devices: int) -> dict[str, Traffic]:
    """Traffic of one device in one run of a compiled program, for every kind in `KINDS`.

    Args:
      hlo: text of the optimized HLO module.
      devices: number of devices that the program was compiled for.

    Raises ValueError if a loop that contains a collective has no known trip count, or if a line
    cannot be parsed.
    """
    bodies, entry = computations(hlo)

    @functools.cache
    def traffic_of(name: str) -> Mapping[str, Traffic]:
        counts: dict[str, int] = collections.defaultdict(int)
        sent: dict[str, float] = collections.defaultdict(float)
        for line in bodies.get(name, ()):
            # Computations that this instruction calls.
            for trips, callee in callees(line):
                for kind, inner in traffic_of(callee).items():
                    if trips is None:
                        raise ValueError(f"a loop of unknown length contains an {kind}: {callee}")
                    counts[kind] += trips * inner.count
                    sent[kind] += trips * inner.bytes
            # The instruction itself.
            if (match := _COLLECTIVE.search(line)) is not None:
                kind = match[2]
                counts[kind] += 1
                sent[kind] += _bytes_sent(kind, match[1], bool(match[3]), line, devices)
        return {kind: Traffic(counts[kind], sent[kind]) for kind in counts}

    total = traffic_of(entry)
    return {kind: total.get(kind, Traffic()) for kind in KINDS}


def _bytes_sent(kind: str, result: str, is_start: bool, line: str, devices: int) -> float:
    """Bytes that a device sends for one operation with the result type `result`."""
    if kind == "collective-permute":
        return size(_results(result) if is_start else result)
    group = _group_size(line, devices)
    full = float(size(_results(result) if is_start else result))
    if kind == "reduce-scatter":
        full *= group
    return full * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def _results(text: str) -> str:
    """The results in `((operands), results)`, the type of an operation's `-start` half."""
    depth, items, begin = 0, [], 1
    for i, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            items.append(text[begin:i])
            begin = i + 1
    return items[1] if len(items) > 1 and text.startswith("((") else text


def _group_size(line: str, devices: int) -> int:
    """Number of devices in one replica group of a collective."""
    if (axes := _AXES.search(line)) is not None:
        sizes = dict(axis.split("=") for axis in axes[1].replace("'", "").split(","))
        names = [name.strip() for name in axes[2].replace("'", "").split(",")]
        return math.prod(int(sizes[name]) for name in names)
    if (listed := _LISTED.search(line)) is not None:
        return len(listed[1].split(","))
    if (iota := _IOTA.search(line)) is not None:
        return int(iota[1])
    if "replica_groups={}" in line:
        return devices
    raise ValueError(f"no replica groups in {line.strip()[:120]!r}")
