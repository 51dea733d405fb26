"""NVFP4: four-bit floats with a scale for 16 neighbours and one for the whole (paper 2.2)."""

from pallas_kernels.nvfp4.api import dequantize, matmul, quantize, which
from pallas_kernels.nvfp4.format import (
    BLOCK,
    LIMITS,
    NVFP4,
    RULES,
    Rule,
    pack,
    swizzle,
    unpack,
    unswizzle,
)
from pallas_kernels.nvfp4.hadamard import SIGNS, rotate

__all__ = [
    "BLOCK",
    "LIMITS",
    "NVFP4",
    "RULES",
    "SIGNS",
    "Rule",
    "dequantize",
    "matmul",
    "pack",
    "quantize",
    "rotate",
    "swizzle",
    "unpack",
    "unswizzle",
    "which",
]
