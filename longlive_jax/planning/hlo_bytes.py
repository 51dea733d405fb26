"""Bytes that a compiled program's kernels read and write, counted in its text."""

import re

from longlive_jax.planning.hlo import computations, size

__all__ = ["program_bytes"]

_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%(\S+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([a-z0-9\-]+)\(([^)]*)\)"
)
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}
_ASYNC = ("-done", "-update")


def program_bytes(hlo: str) -> int:
    """Bytes of the operands and results of all instructions of the entry computation.

    Every kernel is taken to read each operand and to write each result once. Loops and conditionals
    count as one kernel, so the program should have none.
    """
    types: dict[str, str] = {}
    total = 0
    bodies, entry = computations(hlo)
    for line in bodies[entry]:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, kind, opcode, operands = match.groups()
        types[name] = kind
        if opcode in _FREE or opcode.endswith(_ASYNC):
            continue
        read = (part.strip().rpartition("%")[2] for part in operands.split(",") if "%" in part)
        total += size(kind) + sum(size(types.get(operand, "")) for operand in read)
    return total
