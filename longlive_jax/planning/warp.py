"""How long one warp takes for a step when nothing else runs on the multiprocessor.

Instructions issue in order. The compiler's stall counts give the fixed latencies. An instruction
with a variable latency sets a scoreboard, and its consumer waits for it. The unit of exponentials
and the integer unit take several cycles for a warp, and a Hopper warpgroup waits for its own tensor
instructions. Waits for other warpgroups are not part of this time.
"""

from longlive_jax.planning.sass import Instruction, Step, product_at

SPECIAL_CYCLES = 8
"""Cycles of a scheduler's unit for exponentials for one warp: four of 32 threads a cycle (CUDA C++
Programming Guide, throughput of native arithmetic: 16 a cycle on a multiprocessor)."""
INTEGER_CYCLES = 2
"""Cycles of a scheduler's integer unit for one warp: 16 of 32 threads a cycle (the same table: 64
comparisons, maxima, shifts and conversions a cycle on a multiprocessor)."""
INTEGER = frozenset({
    "FMNMX", "FMNMX3", "ISETP", "FSETP", "FSEL", "SEL", "LOP3", "PLOP3", "SHF", "PRMT", "F2FP",
    "IADD3", "VIADD", "LEA", "IMNMX", "VIMNMX", "P2R", "R2P", "SGXT",
})  # fmt: skip
"""Instructions of the integer unit."""
LATENCY = {
    "MUFU": 20, "SHFL": 24, "LDS": 30, "LDSM": 33, "STS": 20, "STSM": 20, "ATOMS": 40,
    "LDG": 270, "LDL": 35, "LDC": 30, "LDCU": 30, "ULDC": 30, "S2R": 25, "S2UR": 25, "R2UR": 12,
    "VOTE": 12, "SYNCS": 25, "LDTM": 40, "STTM": 30, "MEMBAR": 30, "FENCE": 30,
}  # fmt: skip
"""Cycles from issue to result of instructions that set a scoreboard. Shared memory, shuffles and
level 2 are as measured on Hopper by Luo et al. (arXiv:2402.13499), rounded; the others assumed."""
OTHER_LATENCY = 20
"""Cycles of every other instruction that sets a scoreboard (assumed)."""
_TRIPS = 4


def chain_cycles(step: Step, multiply_adds_per_cycle: int) -> float:
    """Cycles of one trip through a step's loop, as the mean over trips after the first.

    Args:
      step: step of a role.
      multiply_adds_per_cycle: 16-bit multiply-adds of a multiprocessor's tensor cores per cycle.
    """
    warp = _Warp(multiply_adds_per_cycle)
    ends = []
    for _ in range(_TRIPS):
        for i in step.path:
            warp.issue(step.program.instructions, i)
        ends.append(warp.time)
    return (ends[-1] - ends[0]) / (_TRIPS - 1)


class _Warp:
    def __init__(self, rate: int) -> None:
        self.rate = rate
        self.time = self.special = self.integer = self.tensor = 0.0
        self.ready = [0.0] * 6
        self.groups: list[float] = []

    def issue(self, code: tuple[Instruction, ...], i: int) -> None:
        """Advances the clock by one instruction."""
        x = code[i]
        # 1. Wait for operands and for a free unit.
        at = max([self.time, *(self.ready[board] for board in x.waits)])
        if x.opcode.startswith("WARPGROUP.DEPBAR"):
            at = max(at, self._group_ends(x))
        if x.name == "MUFU":
            at = max(at, self.special)
            self.special = at + SPECIAL_CYCLES
        if x.name in INTEGER:
            at = max(at, self.integer)
            self.integer = at + INTEGER_CYCLES
        # 2. Record when its result is ready. Only Hopper's warps wait for `tensor`.
        if (product := product_at(code, i)) is not None:
            cycles = product.multiply_adds * product.bits / 16 / self.rate
            self.tensor = max(self.tensor, at) + cycles
            if x.operands.endswith("gsb0"):
                self.groups.append(self.tensor)
        for board in x.sets:
            self.ready[board] = max(self.ready[board], at + LATENCY.get(x.name, OTHER_LATENCY))
        self.time = at + max(1, x.stall)

    def _group_ends(self, wait: Instruction) -> float:
        """When all but the last few groups of tensor instructions are done, as `wait` allows."""
        pending = int(wait.operands.rpartition(", ")[2], 16)
        return self.groups[-1 - pending] if len(self.groups) > pending else 0.0
