"""Reads a kernel's machine code: what one step of each warpgroup's inner loop costs.

nvdisasm prints every instruction with the control bits that ptxas chose: which scoreboards the
instruction waits for, which it sets when its result arrives, and after how many cycles the warp may
issue the next instruction. Nothing here is measured; everything is counted.

The code of a kernel falls into roles. A role starts where a warpgroup asks for its registers
(`USETMAXREG`). Code without such an instruction forms a single role. A step is one trip through an
innermost loop of a role. Blocks that a step may skip and that only mask or rescale are not
part of it; their size is reported.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

WARPGROUP = 128
"""Threads of a warpgroup."""
OPTIONAL = 16
"""A skipped block with fewer instructions counts as part of the step."""

_LINE = re.compile(
    r"\s*(?P<wait>0x[0-9a-f]+|[-0-9&]+):(?P<read>[-0-9]):(?P<write>[-0-9]):[-Y]:(?P<stall>\d\d)"
    r"\s+/\*[0-9a-f]+\*/\s+(?P<predicate>@!?U?P\w+ )?"
    r"(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*$"
)
_LABEL = re.compile(r"(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_NEVER_OPTIONAL = ("HGMMA", "UTC", "UTMA", "SYNCS", "MUFU.EX2")
_DEPTH = {"UTCHMMA": 16, "UTCQMMA": 32, "UTCOMMA": 64}
"""Tensor instruction of Blackwell -> elements along the contracted dimension."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction with its control bits.

    Attributes:
      opcode: mnemonic with its suffixes, such as "HGMMA.64x128x16.F32.BF16".
      operands: operands as printed.
      conditional: whether it has a predicate.
      stall: cycles until the warp may issue the next instruction.
      waits: scoreboards that must be clear before it issues.
      sets: scoreboards that are set until its result is written or its operands are read.
      target: index of the instruction that a branch jumps to, or None.
    """

    opcode: str
    operands: str
    conditional: bool
    stall: int
    waits: tuple[int, ...]
    sets: tuple[int, ...]
    target: int | None

    @property
    def name(self) -> str:
        """The mnemonic without suffixes."""
        return self.opcode.partition(".")[0]


@dataclasses.dataclass(frozen=True)
class Product:
    """A tensor instruction: an m x n x k product.

    Attributes:
      shape: (m, n, k) of one instruction of one multiprocessor.
      bits: size of an operand element.
      a_shared: whether the first operand is read from shared memory.
      pair: whether two multiprocessors compute it and each holds half of the second operand.
    """

    shape: tuple[int, int, int]
    bits: int
    a_shared: bool
    pair: bool = False

    @property
    def multiply_adds(self) -> int:
        """Multiply-add operations."""
        m, n, k = self.shape
        return m * n * k

    @property
    def shared_bytes(self) -> int:
        """Bytes of operands that are read from shared memory."""
        m, n, k = self.shape
        return ((n >> self.pair) + m * self.a_shared) * k * self.bits // 8


class Program:
    """The instructions of one kernel."""

    def __init__(self, text: str) -> None:
        lines: list[re.Match[str]] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(lines)
            elif match := _LINE.match(line):
                lines.append(match)
        self.instructions = tuple(_instruction(match, labels) for match in lines)

    @cached_property
    def roles(self) -> tuple["Role", ...]:
        """The roles in the order of the code; the first may be the code before any role."""
        starts = [i for i, x in enumerate(self.instructions) if x.name == "USETMAXREG"]
        bounds = [*starts, len(self.instructions)]
        roles = [Role(self, a, b) for a, b in zip(starts, bounds[1:], strict=True)]
        return (Role(self, 0, bounds[0]), *roles)


@dataclasses.dataclass(frozen=True)
class Role:
    """Instructions `begin` to `end` of a program: what one kind of warpgroup executes."""

    program: Program
    begin: int
    end: int

    @property
    def registers(self) -> int | None:
        """Registers that each thread of the role asks for, or None if it does not ask."""
        first = self.program.instructions[self.begin]
        numbers = re.findall(r"0x[0-9a-f]+", first.operands) if first.name == "USETMAXREG" else []
        return int(numbers[-1], 16) if numbers else None

    @cached_property
    def steps(self) -> tuple["Step", ...]:
        """One step of every innermost loop of the role."""
        inner = [
            loop for loop in self._loops() if not _spins(self.program.instructions[slice(*loop)])
        ]
        innermost = [
            (a, b)
            for a, b in inner
            if not any((a, b) != (c, d) and a <= c and d <= b for c, d in inner)
        ]
        return tuple(Step(self.program, a, b) for a, b in sorted(set(innermost)))

    @property
    def step(self) -> "Step | None":
        """The step that does most of the role's work, or None without a loop."""
        return max(self.steps, key=lambda step: step.weight, default=None)

    def _loops(self) -> Iterator[tuple[int, int]]:
        """(first instruction, one past the branch back) of every loop."""
        code = self.program.instructions
        for i in range(self.begin, self.end):
            target = code[i].target
            if target is None or not self.begin <= target < i:
                continue
            # A wait that failed is polled at the end of the code; its return is no loop.
            previous = code[i - 1].target
            if not code[i].conditional and previous is not None and previous <= i - 1:
                continue
            yield target, i + 1


class Step:
    """One trip through the loop of instructions `begin` to `end`."""

    def __init__(self, program: Program, begin: int, end: int) -> None:
        self.program, self.begin, self.end = program, begin, end
        self.path, self.optional = _path(program.instructions, begin, end)

    @cached_property
    def instructions(self) -> tuple[Instruction, ...]:
        """The instructions in the order of execution."""
        return tuple(self.program.instructions[i] for i in self.path)

    @property
    def stall_cycles(self) -> int:
        """Sum of the fixed stalls of a warp."""
        return sum(max(1, x.stall) for x in self.instructions)

    @property
    def barriers(self) -> int:
        """Barriers at which a warp waits for other warps."""
        return self.count(r"BAR\.(SYNC|RED)")

    @property
    def exponentials(self) -> int:
        """Exponentials of one thread."""
        return self.count(r"MUFU\.EX2")

    @property
    def special(self) -> int:
        """Instructions of one thread for the unit of exponentials and reciprocals."""
        return self.count(r"MUFU")

    @property
    def conversions(self) -> int:
        """Conversions between number formats of one thread."""
        return self.count(r"F2F|I2F|F2I|F2FP|I2FP|F2IP")

    @property
    def access_bytes(self) -> int:
        """Bytes of shared memory that a warpgroup reads and writes by its own instructions."""
        return WARPGROUP * sum(_access_bytes(x) for x in self.instructions)

    @property
    def global_bytes(self) -> int:
        """Bytes that one thread reads from and writes to global memory."""
        names = ("LDG", "STG", "LD", "ST")
        return sum(_width(x.opcode) for x in self.instructions if x.name in names)

    @cached_property
    def tma_bytes(self) -> int:
        """Bytes that the step announces to barriers and TMA then writes to shared memory.

        Mosaic's barriers count the threads of a warpgroup: every thread announces its part of the
        bytes, or those of one warp do so and arrive for the other threads as well.
        """
        code, total, extra = self.program.instructions, 0, 0
        for i in self.path:
            x = code[i]
            if not x.opcode.startswith("SYNCS.ARRIVE.TRANS64"):
                continue
            register = re.search(r", (R\d+)$", x.operands)
            value = constant(code, i, register[1]) if register else None
            if x.opcode.endswith(".ART0"):
                extra = value or 0
            elif x.opcode == "SYNCS.ARRIVE.TRANS64":
                total += (value or 0) * WARPGROUP // (1 + extra)
                extra = 0
        return total

    @cached_property
    def products(self) -> dict[Product, int]:
        """Tensor instructions and their number."""
        code = self.program.instructions
        return dict(Counter(p for i in self.path if (p := product_at(code, i)) is not None))

    @property
    def multiply_adds(self) -> int:
        """Multiply-add operations of the tensor instructions."""
        return sum(product.multiply_adds * n for product, n in self.products.items())

    @property
    def weight(self) -> tuple[int, int, int, int]:
        """Sorts the steps of a role by their work: products, exponentials, global memory, code.

        Of loops with the same products the shorter counts, which is the one without a mask.
        """
        return (self.multiply_adds, self.exponentials, self.global_bytes, self._length())

    def _length(self) -> int:
        size = len(self.path)
        return -size if self.multiply_adds or self.exponentials else size

    def count(self, pattern: str) -> int:
        """Instructions whose mnemonic matches a regular expression from its start."""
        return sum(
            bool(re.match(rf"(?:{pattern})(?![A-Z0-9])", x.opcode)) for x in self.instructions
        )


def constant(code: Sequence[Instruction], before: int, register: str) -> int | None:
    """The constant that `register` holds at instruction `before`, or None if it is not constant.

    The nearest assignment above decides.
    """
    for x in reversed(code[:before]):
        if not re.match(rf"{register}\b", x.operands):
            continue
        if x.name in ("UMOV", "MOV", "IMAD") and (m := re.search(r", (0x[0-9a-f]+)$", x.operands)):
            return int(m[1], 16) if x.opcode in ("UMOV", "MOV", "IMAD.MOV.U32") else None
        if x.name == "HFMA2" and (m := re.search(r"-RZ, RZ, (\S+), (\S+)$", x.operands)):
            return int(np.array([m[2], m[1]], np.float16).view(np.uint32)[0])
        return None
    return None


def _instruction(match: re.Match, labels: dict[str, int]) -> Instruction:
    wait = match["wait"]
    if wait.startswith("0x"):
        waits = tuple(i for i in range(6) if int(wait, 16) >> i & 1)
    else:
        waits = tuple(int(x) for x in re.findall(r"\d", wait))
    opcode, operands = match["opcode"], match["operands"]
    target = _TARGET.search(operands) if opcode.partition(".")[0] == "BRA" else None
    return Instruction(
        opcode,
        operands,
        match["predicate"] is not None or bool(re.match(r"!?U?P\d", operands)),
        int(match["stall"]),
        waits,
        tuple(int(match[k]) for k in ("read", "write") if match[k] != "-"),
        labels.get(target[1]) if target else None,
    )


def _spins(body: Sequence[Instruction]) -> bool:
    """Whether a loop only polls a barrier or an allocator."""
    polls = ("NANOSLEEP", "USETMAXREG", "UTCATOMSWS.FIND", "SYNCS.PHASECHK")
    works = ("UTMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA", "SYNCS.ARRIVE", "BAR")
    return (
        len(body) <= OPTIONAL
        and any(x.opcode.startswith(polls) for x in body)
        and not any(x.opcode.startswith(works) for x in body)
    )


def _path(code: Sequence[Instruction], begin: int, end: int) -> tuple[list[int], int]:
    """Indices of one trip through a loop, and the number of instructions in skipped blocks."""
    path: list[int] = []
    skipped, i = 0, begin
    while i < end and len(path) < len(code):
        path.append(i)
        x, following = code[i], i + 1
        if x.target is not None and i + 1 < x.target < end:
            block = code[i + 1 : x.target]
            if not x.conditional:
                following = x.target
            elif len(block) > OPTIONAL and not any(
                y.opcode.startswith(_NEVER_OPTIONAL) for y in block
            ):
                skipped, following = skipped + len(block), x.target
        i = following
    return path, skipped


def _width(opcode: str) -> int:
    """Bytes that a load or store moves per thread."""
    if m := re.search(r"\.[US]?(8|16|64|128|256)\b", opcode):
        return int(m[1]) // 8
    return 4


def _access_bytes(x: Instruction) -> int:
    if x.name in ("LDSM", "STSM"):
        matrices = re.search(r"88\.([24])", x.opcode)
        return 4 * int(matrices[1]) if matrices else 4
    return _width(x.opcode) if x.name in ("LDS", "STS", "ATOMS") else 0


def product_at(code: Sequence[Instruction], i: int) -> Product | None:
    """The product of instruction i; None if it is no tensor instruction.

    Raises ValueError if the shape of a Blackwell instruction is not a constant.
    """
    x = code[i]
    if x.name in ("HGMMA", "QGMMA", "IGMMA"):
        m, n, k = (int(s) for s in re.findall(r"\d+(?=x)|(?<=x)\d+", x.opcode)[:3])
        return Product((m, n, k), 256 // k, x.operands.split(", ")[1].startswith("gdesc"))
    if x.name not in _DEPTH:
        return None
    register = re.search(r"idesc\[(UR\d+)\]", x.operands)
    word = constant(code, i, register[1]) if register else None
    if word is None:
        raise ValueError(f"shape of {x.opcode} {x.operands} is not a constant")
    rows = (word >> 27 & 3) << 7 if x.name == "UTCOMMA" else (word >> 24 & 31) << 4
    pair = ".2CTA" in x.opcode
    k = _DEPTH[x.name]
    shape = rows >> pair, (word >> 17 & 63) << 3, k
    return Product(shape, 256 // k, x.operands.startswith("gdesc"), pair)
