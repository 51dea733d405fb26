"""NVFP4: 4-bit floats with one scale per 16 values and one per tensor (paper, section 2.2)."""

from pallas_kernels.nvfp4.api import (
    dequantize,
    linear_implementation,
    matmul,
    quantize,
    quantize_both,
    select_implementation,
    statistics,
)
from pallas_kernels.nvfp4.format import (
    BLOCK,
    LIMITS,
    NVFP4,
    RULES,
    Rule,
    ScaleLayout,
    StochasticRounding,
    from_tiles,
    pack,
    swizzle,
    to_tiles,
    unpack,
    unswizzle,
    with_scale_layout,
)
from pallas_kernels.nvfp4.hadamard import SIGNS, rotate

__all__ = [
    "BLOCK",
    "LIMITS",
    "NVFP4",
    "RULES",
    "SIGNS",
    "Rule",
    "ScaleLayout",
    "StochasticRounding",
    "dequantize",
    "from_tiles",
    "linear_implementation",
    "matmul",
    "pack",
    "quantize",
    "quantize_both",
    "rotate",
    "select_implementation",
    "statistics",
    "swizzle",
    "to_tiles",
    "unpack",
    "unswizzle",
    "with_scale_layout",
]
