"""NVFP4: 4-bit floats with one scale per 16 values and one per tensor (paper, section 2.2)."""

from pallas_kernels.nvfp4.api import dequantize, matmul, quantize, select_implementation
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
    "select_implementation",
    "swizzle",
    "unpack",
    "unswizzle",
]
