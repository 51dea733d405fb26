"""Copies in a compiled program: what its kernels move without computing, counted from HLO text.

A kernel copies the elements of its result that are those of an operand: sliced, joined, transposed,
padded, gathered, or written into another array. It reads and writes each of them once. A fusion
copies the part of its result that nothing inside it computes. A kernel in a loop counts once per
iteration.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

from longlive_jax.planning.hlo import callees, computations, size

__all__ = ["Copy", "copied_bytes", "copies"]

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FUSED = re.compile(r"calls=%?([\w.\-]+)")
_MOVES = {
    "copy", "copy-start", "dynamic-slice", "gather", "pad", "reverse", "slice", "transpose",
}  # fmt: skip
"""Instructions whose result has elements of the first operand."""
_VIEWS = {"bitcast", "get-tuple-element", "reshape"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Instructions that write one operand into another, in place."""
_KERNELS = _MOVES | _UPDATES.keys() | {"concatenate", "fusion", "fusion-start"}
_CALLERS = ("while", "call", "conditional", "async-start")


@dataclasses.dataclass(frozen=True)
class Copy:
    """One copy.

    Attributes:
      name: the instruction.
      result: its type.
      runs: how many times it runs in one run of the program.
      bytes: bytes that one run reads and writes to copy.
      op_name: the operation in the JAX program that it stems from.
    """

    name: str
    result: str
    runs: int
    bytes: int
    op_name: str


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    result: str
    op: str
    operands: tuple[str, ...]
    line: str


_Body = Mapping[str, _Instruction]


def copies(hlo: str) -> list[Copy]:
    """All copies of a compiled program.

    Raises ValueError for a loop of unknown length that contains one.
    """
    bodies, entry = computations(hlo)
    parsed = {name: _parse(lines) for name, lines in bodies.items()}

    def visit(name: str, runs: int | None) -> Iterator[Copy]:
        for x in parsed.get(name, {}).values():
            if x.op in _KERNELS and (moved := 2 * _moved_by_kernel(x, parsed[name], parsed)):
                if runs is None:
                    raise ValueError(f"a loop of unknown length contains the copy {x.name}")
                op_name = _OP_NAME.search(x.line)
                yield Copy(x.name, x.result, runs, moved, "" if op_name is None else op_name[1])
            if x.op in _CALLERS:
                for trips, callee in callees(x.line):
                    yield from visit(callee, trips * runs if trips and runs else None)

    return list(visit(entry, 1))


def copied_bytes(kernels: Sequence[Copy]) -> int:
    """Bytes that these copies read and write in one run of the program."""
    return sum(copy.runs * copy.bytes for copy in kernels)


def _parse(lines: Sequence[str]) -> _Body:
    """The instructions of a computation by name; the last one is its root."""
    body = {}
    for line in lines:
        if (match := _INSTRUCTION.match(line)) is not None:
            operands = _OPERAND.findall(match[4].split("), ")[0])
            body[match[1]] = _Instruction(match[1], match[2], match[3], tuple(operands), line)
    return body


def _moved_by_kernel(x: _Instruction, body: _Body, parsed: Mapping[str, _Body]) -> int:
    """Bytes of the result that the kernel of an instruction copies."""
    fused = _FUSED.search(x.line) if x.op.startswith("fusion") else None
    if fused is None:
        return _moved(x, body, inside=False)
    inner = parsed[fused[1]]
    return _moved(list(inner.values())[-1], inner, inside=True)


def _moved(x: _Instruction, body: _Body, *, inside: bool) -> int:
    """Bytes of an instruction's result that are elements of its computation's parameters.

    Outside of a fusion (`inside` is False) every operand is an array in memory.
    """
    if not inside and x.op not in _KERNELS:
        return size(x.result)
    operands = [body[name] for name in x.operands if name in body]

    def part(index: int) -> int:
        return _moved(operands[index], body, inside=inside)

    if x.op == "parameter":
        return size(x.result)
    if x.op in ("tuple", "concatenate"):
        return sum(part(i) for i in range(len(operands)))
    if x.op == "select":
        return min(part(1), part(2))
    if x.op in _UPDATES:
        return part(_UPDATES[x.op])
    if x.op in _VIEWS | _MOVES and part(0):
        return size(operands[0].result if x.op == "copy-start" else x.result)
    return 0
