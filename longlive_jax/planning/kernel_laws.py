"""Rules of the hardware that a compiled kernel must keep and that no compiler checks for it.

A kernel that breaks one compiles, and even passes in the interpreter, but on a chip it hangs, is
refused at launch or fails now and then.
"""

from collections.abc import Mapping
from typing import Any

from longlive_jax.planning.deviceless import SHARED_MEMORY, TENSOR_COLUMNS

REGISTERS = 65_536
"""Registers of a multiprocessor."""
NAMED_BARRIERS = 16
"""Hardware barriers of a block (PTX ISA, `barrier`)."""
FORWARD = ("attention_forward", "attention_packed")
"""Names of the kernels of forward attention begin so."""
STEP_KEYS = 128
"""Keys of a forward attention step on Blackwell at least, unless two multiprocessors share it.
tokamax refuses smaller steps because they fail now and then with an invalid instruction."""


def violations(name: str, report: Mapping[str, Any], chip: str) -> list[str]:
    """The laws that a kernel breaks, in words.

    Args:
      name: the catalog's name of the kernel.
      report: what `deviceless.inspect` returns on it.
      chip: architecture that it is meant for, such as "sm_100a".
    """
    problems = []
    if report["architecture"] != chip:
        problems.append(f"compiled for {report['architecture']}")
    if report["spilled_bytes"]:
        problems.append(f"{report['spilled_bytes']} bytes of registers spill")
    if report["lacking"]:
        lacking = ", ".join(sorted(report["lacking"]))
        problems.append(f"instructions it is written for are missing: {lacking}")
    if report["shared_bytes"] > SHARED_MEMORY:
        problems.append(f"{report['shared_bytes']} bytes of shared memory")
    if report["tensor_columns"] > TENSOR_COLUMNS:
        problems.append(f"{report['tensor_columns']} columns of tensor memory")
    if report.get("unread"):
        problems.append(f"its machine code cannot be read: {report['unread']}")
    facts = report.get("facts")
    return problems + (_violations_of_facts(name, facts, chip) if facts else [])


def _violations_of_facts(name: str, facts: Mapping[str, Any], chip: str) -> list[str]:
    problems = []
    pool, asked = facts["register_pool"], facts["registers_asked"]
    if pool > REGISTERS:
        problems.append(f"{pool} registers at launch, more than {REGISTERS}")
    if asked > pool:
        counts = " + ".join(str(count) for count in facts["warpgroup_registers"])
        problems.append(
            f"its warpgroups ask for {counts} registers a thread, {asked} in all, of a pool of "
            f"{pool}: it waits for ever"
        )
    if facts["named_barriers"] > NAMED_BARRIERS:
        problems.append(f"{facts['named_barriers']} hardware barriers, more than {NAMED_BARRIERS}")
    problems += facts["tma_violations"]
    keys = _forward_keys(facts) if name.startswith(FORWARD) and chip == "sm_100a" else None
    if keys is not None and keys < STEP_KEYS:
        problems.append(f"steps of {keys} keys on one multiprocessor, fewer than {STEP_KEYS}")
    return problems


def _forward_keys(facts: Mapping[str, Any]) -> int | None:
    """Keys of a step on one multiprocessor: the narrower of the products' results.

    None if pairs of multiprocessors compute the products.
    """
    steps = [role["step"] for role in facts["roles"] if role["step"]]
    products = [product for step in steps for product in step["products"]]
    if any(product["pair"] for product in products):
        return None
    return min((product["shape"][1] for product in products), default=None)
