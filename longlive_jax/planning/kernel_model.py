"""A time for one step of a kernel, from counts in its machine code.

The time is `(max(tensor, shared memory, exponentials, issue) + exposed stalls + fill) / SUSTAINED`,
in cycles of one multiprocessor. The first four are what the step asks of units that all warpgroups
share. Exposed stalls are what the slowest role takes beyond that on its own. Fill is the code
around the loop, spread over the steps of a tile. The share of the chip's limit is the time of
the useful products at the data sheet's rate over the modelled time. Cycles cancel, so that only the
rates per cycle matter.

Assumptions: roles take the same number of steps, unless softmax warpgroups take turns; there are no
bank conflicts; data arrives in time from level 2; roles that can overlap do so completely. What
these assumptions and a clock below the data sheet's cost is the only fitted number, `SUSTAINED`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longlive_jax.planning.chips import get_chip
from longlive_jax.planning.kernel_facts import MULTIPLY_ADDS
from longlive_jax.planning.warp import INTEGER_CYCLES, SPECIAL_CYCLES

SHARED_BYTES = 128
"""Bytes that shared memory delivers per cycle (CUDA C++ Programming Guide: 32 banks of 4 bytes)."""
SCHEDULERS = 4
"""Schedulers of a multiprocessor; each has one warp of every warpgroup and issues one instruction
per cycle."""
STEPS = 128
"""Steps of a tile over which the code around the loop is spread: 16,384 keys in steps of 128."""
SUSTAINED = 0.70
"""Share of the modelled rate that a chip sustains. Fitted to one measurement: tokamax's forward
attention on an H100 at head width 128, 682 TFLOP/s. Its other measurements test it
(`bench/results/calibration_attention_h100.json`)."""
CHIPS = {"sm_90a": "h200", "sm_100a": "gb200"}
"""Architecture -> chip of `planning.chips` whose limit the shares refer to."""
WIDTH = 128
"""Head width of the 5B model."""
GRADIENTS = "attention_gradients"
"""Names of catalog entries that run a forward kernel and then the backward kernels begin so."""
BACKWARD_PRODUCTS = 5
"""Products that the gradients of attention need: logits, dP, dQ, dK and dV."""

Facts = Mapping[str, Any]
"""What `kernel_facts.facts` returns."""


def step_cycles(
    facts: Facts, architecture: str, *, products: int = 2, width: int = WIDTH
) -> dict[str, float]:
    """Cycles of one step of a kernel with tensor instructions, by cause.

    Args:
      facts: facts about the kernel.
      architecture: "sm_90a" or "sm_100a".
      products: products per logit that the kernel computes at least: 2, or 3 in a backward kernel.
        It tells whether softmax warpgroups take turns at the steps of the tensor instructions.
      width: head width.

    Returns tensor_cycles, smem_cycles, softmax_cycles (exponentials and reciprocals), issue_cycles,
    stall_cycles (exposed), fill_cycles, and their combination step_cycles.
    """
    # 1. What the step asks of units that all warpgroups share.
    turns = _turns(facts, architecture, products, width)

    def total(cost: Callable[[dict[str, Any]], float]) -> float:
        return sum(
            _warpgroups(role) * cost(role["step"]) / _turns_of(role, turns)
            for role in _stepping(facts)
        )

    accessed = total(lambda step: step["access_bytes"])
    units = {
        "tensor_cycles": multiply_adds(facts, architecture) / MULTIPLY_ADDS[architecture],
        "smem_cycles": (_product_bytes(facts, architecture) + accessed) / SHARED_BYTES,
        "softmax_cycles": total(lambda step: step["special"] * SPECIAL_CYCLES),
        "issue_cycles": max(
            total(lambda step: step["instructions"]),
            total(lambda step: step["integer"] * INTEGER_CYCLES),
        ),
    }
    # 2. What the slowest role adds, and the code around the loop.
    busy = max(units.values())
    slowest = max(
        role["step"]["chain_cycles"] / _turns_of(role, turns) for role in _stepping(facts)
    )
    stalls = max(0.0, slowest - busy)
    fill = max(role["outside_stalls"] for role in _stepping(facts)) / STEPS
    cycles = (busy + stalls + fill) / SUSTAINED
    return units | {"stall_cycles": stalls, "fill_cycles": fill, "step_cycles": cycles}


def attention_share(
    kernels: Sequence[Facts], architecture: str, *, useful: int, width: int = WIDTH
) -> float:
    """Share of the limit that one or more kernels of attention reach together.

    Args:
      kernels: facts about the kernels, each of which walks over all pairs of tiles.
      architecture: "sm_90a" or "sm_100a".
      useful: products of queries x keys x width that the result needs: 2 for the forward pass, 5
        for the gradients. Kernels that compute a product twice gain nothing by it.
      width: head width.
    """
    per_product = 0.0
    least = 2 if useful == 2 else 3
    for facts in kernels:
        cycles = step_cycles(facts, architecture, products=least, width=width)["step_cycles"]
        logits = _logits(facts) / _turns(facts, architecture, least, width)
        per_product += cycles / (logits * width)
    return useful / MULTIPLY_ADDS[architecture] / per_product


def product_share(facts: Facts, architecture: str) -> float:
    """Share of the tensor cores' limit, for the number format used, that a product reaches."""
    cycles = step_cycles(facts, architecture)
    return cycles["tensor_cycles"] / cycles["step_cycles"]


def bandwidth_share(facts: Facts, architecture: str) -> float | None:
    """Share of the memory bandwidth that a kernel without products reaches; None if unknown.

    A warp's instructions issue on one of four schedulers; other warps fill its stalls. Only a
    kernel with a single loop is modelled, as loops may differ in their number of trips. A share of
    1 says that instructions are not the limit. Not calibrated.
    """
    roles = _stepping(facts)
    if sum(role["loops"] for role in roles) != 1:
        return None
    step = max((role["step"] for role in roles), key=lambda step: step["global_bytes"])
    if not step["global_bytes"]:
        return None
    chip = get_chip(CHIPS[architecture])
    clock = chip.bf16_flops / (2 * MULTIPLY_ADDS[architecture] * chip.multiprocessors)
    per_cycle = chip.memory_bandwidth / (chip.multiprocessors * clock)
    memory = 32 * step["global_bytes"] / per_cycle
    units = max(
        step["instructions"], step["integer"] * INTEGER_CYCLES, step["special"] * SPECIAL_CYCLES
    )
    return memory / max(memory, units / SCHEDULERS)


def model_share(name: str, kernels: Sequence[Facts | None], architecture: str) -> float | None:
    """Modelled share of the chip's limit of a catalog entry's kernels; None if there is no model.

    Kernels with products refer to the tensor cores' limit, others to the bandwidth. An entry that
    launches both kinds has the share of its products; what the others move comes on top.
    """
    if not (facts := modelled(name, kernels)):
        return None
    if name.startswith(GRADIENTS):
        return attention_share(facts, architecture, useful=BACKWARD_PRODUCTS)
    if products := [x for x in facts if has_products(x)]:
        return min(product_share(x, architecture) for x in products)
    return bandwidth_share(facts[0], architecture)


def modelled(name: str, kernels: Sequence[Facts | None]) -> list[Facts]:
    """The kernels that the share of a catalog entry refers to; none if one could not be read.

    Gradients are those of the backward kernels: the forward kernel that runs first has an entry of
    its own.
    """
    facts = [x for x in kernels if x is not None]
    if len(facts) < len(kernels):
        return []
    return facts[1:] if name.startswith(GRADIENTS) else facts


def has_products(facts: Facts) -> bool:
    """Whether a step of the kernel has tensor instructions."""
    return any(role["step"]["products"] for role in _stepping(facts))


def multiply_adds(facts: Facts, architecture: str) -> float:
    """Multiply-adds of a step in units of 16-bit ones: 4-bit products run four times as fast."""
    return sum(
        n * m * rows * k * product["bits"] / 16
        for n, product in _products(facts, architecture)
        for m, rows, k in [product["shape"]]
    )


def _products(facts: Facts, architecture: str) -> list[tuple[int, dict[str, Any]]]:
    """(number in a step of the multiprocessor, product). Warpgroups of Hopper issue their own."""
    return [
        (product["count"] * (_warpgroups(role) if architecture == "sm_90a" else 1), product)
        for role in _stepping(facts)
        for product in role["step"]["products"]
    ]


def _product_bytes(facts: Facts, architecture: str) -> float:
    """Bytes of shared memory that products read and that TMA writes for them in a step."""
    read, streamed = 0.0, 0.0
    for n, product in _products(facts, architecture):
        m, rows, k = product["shape"]
        second = (rows >> product["pair"]) * k * product["bits"] / 8
        read += n * (second + product["a_shared"] * m * k * product["bits"] / 8)
        streamed += product["count"] * second  # Hopper's warpgroups share what is loaded
    # A loader may be unrolled; a step cannot load more than its products read.
    loaded = max(role["tma_bytes"] for role in facts["roles"])
    return read + min(loaded, streamed)


def _logits(facts: Facts) -> int:
    """Logits of a step: one exponential each, apart from those of the rows.

    Warpgroups with code of their own work on tiles of their own.
    """
    return sum(
        _warpgroups(role) * 128 * (role["step"]["exponentials"] // 16 * 16)
        for role in _stepping(facts)
    )


def _turns(facts: Facts, architecture: str, products: int, width: int) -> float:
    """Steps of the tensor instructions for one step of the softmax warpgroups.

    It is two where two warpgroups take turns. A backward kernel computes three to five products per
    logit; polynomials may replace some exponentials of a forward kernel.
    """
    if not (logits := _logits(facts)):
        return 1
    computed = multiply_adds(facts, architecture) / (logits * width)
    choices = (0.5, 1, 2) if products == 2 else (1, 2)
    if products == 2:
        return min(choices, key=lambda turns: abs(math.log(computed * turns / products)))
    return next(turns for turns in choices if computed * turns > products - 0.5 or turns == 2)


def _turns_of(role: Mapping[str, Any], turns: float) -> float:
    return turns if role["step"]["exponentials"] else 1


def _stepping(facts: Facts) -> list[dict[str, Any]]:
    return [role for role in facts["roles"] if role["step"] is not None]


def _warpgroups(role: Mapping[str, Any]) -> int:
    return role["warpgroups"] or 1
