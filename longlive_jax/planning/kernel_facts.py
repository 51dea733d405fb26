"""Facts about one compiled kernel, as plain numbers that can be stored in a results table.

All of them are counted in the dump of Mosaic's compiler, except `chain_cycles`, which is the time
of a warp on its own (`planning.warp`).
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longlive_jax.planning.ptx import WARPGROUP, Ptx
from longlive_jax.planning.sass import Program, Role, Step
from longlive_jax.planning.tma import descriptors
from longlive_jax.planning.warp import INTEGER, chain_cycles

MULTIPLY_ADDS = {"sm_90a": 2048, "sm_100a": 4096}
"""Architecture -> 16-bit multiply-adds of a multiprocessor's tensor cores per cycle: the data
sheets' 989 TFLOP/s of 132 multiprocessors at 1.83 GHz, and 2,500 of 152 at 2.01 GHz."""

LOOP = 32
"""A loop with fewer instructions does not count as one of a role's loops."""


def facts(folder: Path, kernel: str, architecture: str, registers: int) -> dict[str, Any]:
    """Facts about a dumped kernel.

    Args:
      folder: dump folder of Mosaic.
      kernel: stem of the kernel's files, such as "body_0".
      architecture: such as "sm_90a".
      registers: registers of a thread at launch.

    Returns a dict of
      threads: threads of a block.
      register_pool: registers of a block at launch.
      registers_asked: registers that its warpgroups hold after they have asked for theirs.
      warpgroup_registers: registers per thread of each warpgroup.
      named_barriers: number of hardware barriers that ptxas reserves.
      mbarriers: number of barriers in shared memory.
      tma_copies: number of kinds of TMA copies.
      tma_violations: hardware rules that they break, in words.
      roles: one dict per role, see `_role`.

    Raises ValueError if the code cannot be read.
    """
    # 1. Read the compilers' files.
    ptx = Ptx((folder / f"{kernel}.ptx").read_text())
    program = Program((folder / f"{kernel}.sass_ctrl").read_text(errors="replace"))
    log = (folder / f"{kernel}.ptxas").read_text(errors="replace")
    resources = (folder / f"{kernel}.resources.txt").read_text()
    copies = descriptors(folder / f"{kernel}.mlir-passes.log")
    # 2. Count.
    asked = [request.registers if request else registers for request in ptx.warpgroups]
    counts = re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", resources)
    barriers = re.search(r"used (\d+) barriers", log)
    return {
        "threads": ptx.threads,
        "register_pool": registers * ptx.threads,
        "registers_asked": sum(count * WARPGROUP for count in asked),
        "warpgroup_registers": asked,
        "named_barriers": _named_barriers(program, int(barriers[1]) if barriers else 0),
        "mbarriers": sum(int(size) * int(n) for size, n in counts),
        "tma_copies": len(copies),
        "tma_violations": sorted({text for copy in copies for text in copy.violations()}),
        "roles": list(_roles(program, ptx, MULTIPLY_ADDS[architecture])),
    }


def _named_barriers(program: Program, reserved: int) -> int:
    """Barriers that the code names; all that ptxas reserved if a register holds a number."""
    names = {x.operands.split(",")[0].strip() for x in program.instructions if x.name == "BAR"}
    if any(not name.startswith("0x") for name in names):
        return reserved
    return len(names)


def _roles(program: Program, ptx: Ptx, rate: int) -> Iterable[dict[str, Any]]:
    sites = {number: list(ptx.warpgroups).count(number) for number in ptx.requests}
    for role in program.roles:
        warpgroups = None
        if role.registers is not None:
            # ptxas keeps the order of requests for the same number of registers.
            site = next((s for s in sites if s.registers == role.registers), None)
            warpgroups = sites.pop(site) if site else None
        elif not ptx.requests:
            warpgroups = ptx.threads // WARPGROUP
        if role.step is not None or warpgroups:
            yield _role(role, warpgroups, rate)


def _role(role: Role, warpgroups: int | None, rate: int) -> dict[str, Any]:
    """Facts about a role.

    registers: registers that a thread asks for, or None.
    warpgroups: number of warpgroups that execute it, or None if unknown.
    code: instructions in total.
    loops: number of its innermost loops of at least LOOP instructions.
    outside_stalls: fixed stalls of its code outside the step.
    tma_bytes: bytes that TMA writes in a step, if one of its loops loads.
    step: facts about the step, or None without a loop.
    """
    step = role.step
    instructions = role.program.instructions
    inside = range(step.begin, step.end) if step else range(0)
    outside = (
        max(1, instructions[i].stall) for i in range(role.begin, role.end) if i not in inside
    )
    return {
        "registers": role.registers,
        "warpgroups": warpgroups,
        "code": role.end - role.begin,
        "loops": sum(len(s.path) >= LOOP for s in role.steps),
        "outside_stalls": sum(outside),
        "tma_bytes": max((s.tma_bytes for s in role.steps), default=0),
        "step": _step(step, rate) if step else None,
    }


def _step(step: Step, rate: int) -> dict[str, Any]:
    """Facts about one step of a warpgroup; see the properties of `Step`."""
    return {
        "instructions": len(step.path),
        "optional": step.optional,
        "integer": sum(x.name in INTEGER for x in step.instructions),
        "stall_cycles": step.stall_cycles,
        "barriers": step.barriers,
        "exponentials": step.exponentials,
        "special": step.special,
        "conversions": step.conversions,
        "access_bytes": step.access_bytes,
        "global_bytes": step.global_bytes,
        "products": [
            {
                "shape": list(p.shape),
                "bits": p.bits,
                "a_shared": p.a_shared,
                "pair": p.pair,
                "count": n,
            }
            for p, n in step.products.items()
        ],
        "chain_cycles": round(chain_cycles(step, rate)),
    }
