"""Reads from a kernel's PTX how many registers each of its warpgroups asks for.

A warpgroup decides by its index which role it executes, and a role begins with `setmaxnreg`. The
reader follows the branches of every warp: values that depend only on the thread's index are
computed, and both sides of any other branch are taken.
"""

import dataclasses
import operator
import re
from collections.abc import Callable
from functools import cached_property

WARP, WARPGROUP = 32, 128
"""Threads of a warp and of a warpgroup."""

_DEFINITION = re.compile(
    r"(?P<op>(?!brx|bar|barrier)[a-z][\w.:]*)\s+(?P<to>%\w+)(?:\|%\w+)?, (?P<args>[^;]*);"
)
_BRANCH = re.compile(r"(?:@(?P<not>!?)(?P<predicate>%\w+) )?bra(?:\.uni)? \s*(?P<label>\$\w+);")
_COMPARISONS = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[..., int]] = {
    "add": operator.add, "sub": operator.sub, "shl": operator.lshift, "shr": operator.rshift,
    "xor": operator.xor, "mov": lambda a: a, "cvt": lambda a: a, "not": lambda a: not a,
    "shfl": lambda a, *_: a, "selp": lambda a, b, p: a if p else b,
    "bfe": lambda a, first, size: a >> first & (1 << size) - 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RegisterRequest:
    """A `setmaxnreg` instruction.

    Attributes:
      line: its line of the text, from 0.
      registers: registers that each thread of the warpgroup asks for.
    """

    line: int
    registers: int


class Ptx:
    """The PTX text of one kernel."""

    def __init__(self, text: str) -> None:
        self.lines = [line.strip() for line in text.splitlines()]
        self._labels = {x.rstrip(":"): i for i, x in enumerate(self.lines) if x.endswith(":")}
        self._definitions: dict[str, list[re.Match]] = {}
        for line in self.lines:
            if match := _DEFINITION.match(line):
                self._definitions.setdefault(match["to"], []).append(match)

    @cached_property
    def threads(self) -> int:
        """Threads of a block."""
        match = re.search(r"\.(?:max|req)ntid (\d+), (\d+), (\d+)", "\n".join(self.lines))
        if match is None:
            raise ValueError("the PTX names no number of threads")
        return int(match[1]) * int(match[2]) * int(match[3])

    @cached_property
    def requests(self) -> tuple[RegisterRequest, ...]:
        """All `setmaxnreg` instructions in the order of the text."""
        matches = ((i, re.match(r"setmaxnreg\S* (\d+)", x)) for i, x in enumerate(self.lines))
        return tuple(RegisterRequest(i, int(match[1])) for i, match in matches if match)

    @cached_property
    def warpgroups(self) -> tuple[RegisterRequest | None, ...]:
        """What each warpgroup of a block asks for; None for one that keeps the launch registers.

        Raises ValueError if a warpgroup may reach several requests.
        """
        return tuple(self._request_of(g) for g in range(-(-self.threads // WARPGROUP)))

    def _request_of(self, warpgroup: int) -> RegisterRequest | None:
        reached = self._reached(warpgroup * WARPGROUP)
        requests = [request for request in self.requests if request.line in reached]
        if len(requests) > 1:
            counts = ", ".join(str(request.registers) for request in requests)
            raise ValueError(f"warpgroup {warpgroup} may ask for {counts} registers")
        return requests[0] if requests else None

    def _reached(self, thread: int) -> set[int]:
        """Lines that the warp of a thread may execute."""
        reached: set[int] = set()
        stack = [0]
        known: dict[str, int | None] = {}
        while stack:
            i = stack.pop()
            while i < len(self.lines) and i not in reached:
                reached.add(i)
                line = self.lines[i]
                if line.startswith("brx.idx"):
                    stack += self._table_targets(line, thread, known)
                    break
                if re.match(r"(ret|exit);", line):
                    break
                if branch := _BRANCH.match(line):
                    jumps = self._jumps(branch, thread, known)
                    if jumps is not False:
                        stack.append(self._labels[branch["label"]])
                    if jumps is True:
                        break
                i += 1
        return reached

    def _jumps(self, branch: re.Match, thread: int, known: dict[str, int | None]) -> bool | None:
        if branch["predicate"] is None:
            return True
        value = self._value(branch["predicate"], thread, known)
        return None if value is None else bool(value) != (branch["not"] == "!")

    def _table_targets(self, line: str, thread: int, known: dict[str, int | None]) -> list[int]:
        """Targets of an indirect branch: one if its index is known, else all."""
        register, table = re.findall(r"[%\w$]+", line.partition("brx.idx")[2])[:2]
        text = "\n".join(self.lines)
        names = re.findall(r"\$\w+", re.search(rf"{re.escape(table)}:([^;]*);", text)[1])  # type: ignore[index]
        targets = [self._labels[name] for name in names]
        index = self._value(register, thread, known)
        return targets if index is None else targets[index : index + 1]

    def _value(self, name: str, thread: int, known: dict[str, int | None]) -> int | None:
        """The value of a register or literal in a thread, or None if it depends on more."""
        if re.fullmatch(r"-?\d+", name):
            return int(name)
        if name == "%tid.x":
            return thread
        if name not in known:
            known[name] = None  # a definition by itself is unknown
            definitions = self._definitions.get(name, [])
            if len(definitions) == 1:
                known[name] = self._evaluate(definitions[0], thread, known)
        return known[name]

    def _evaluate(self, match: re.Match, thread: int, known: dict[str, int | None]) -> int | None:
        kind, *suffixes = match["op"].split(".")
        values = [self._value(x.strip(), thread, known) for x in match["args"].split(",")]
        if kind in ("and", "or"):
            decisive = [v for v in values if v is not None and bool(v) == (kind == "or")]
            if suffixes == ["pred"] and decisive:
                return decisive[0]
            combine = operator.and_ if kind == "and" else operator.or_
            a, b = values
            return None if a is None or b is None else combine(a, b)
        if kind == "shfl" and "idx" not in suffixes:
            return None
        numbers = [v for v in values if v is not None]
        if len(numbers) < len(values):
            return None
        if kind == "setp":
            return int(_COMPARISONS[suffixes[0]](*numbers)) if len(numbers) == 2 else None
        return _ARITHMETIC[kind](*numbers) if kind in _ARITHMETIC else None
