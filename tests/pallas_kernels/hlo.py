"""What a lowered or compiled program contains, read from its text."""

import math
import re

PRODUCT = re.compile(
    r"stablehlo\.dot_general .*: \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\)"
)
ARRAY = re.compile(r"\b(?:pred|bf16|[suf]\d+)\[([\d,]*)\]")
LOOP = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def product_dtypes(stablehlo: str) -> set[str]:
    """The dtypes ("bf16") of the operands of all matrix products in a lowered program."""
    return {dtype for operands in PRODUCT.findall(stablehlo) for dtype in operands}


def array_shapes(hlo: str) -> set[tuple[int, ...]]:
    """The shapes of all arrays in a compiled program."""
    return {tuple(map(int, filter(None, dims.split(",")))) for dims in ARRAY.findall(hlo)}


def largest_array(hlo: str) -> int:
    """The number of elements of the largest array in a compiled program."""
    return max(map(math.prod, array_shapes(hlo)))


def loop_lengths(hlo: str) -> list[int]:
    """The trip counts of all loops in a compiled program whose trip count is static."""
    return [int(length) for length in LOOP.findall(hlo)]
