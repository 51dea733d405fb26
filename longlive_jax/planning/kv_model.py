"""Modelled share of a chunk's time that quantizing and reading an NVFP4 KV cache take (5B model).

All data passes through memory once per kernel at the data sheet's bandwidth; kernels that do not
reach it are slower by their modelled share. Linears take the sustained rate in bfloat16.
"""

import math

from longlive_jax.models.wan.config import DiTConfig
from longlive_jax.planning.chips import Chip
from longlive_jax.planning.kernel_model import SUSTAINED
from longlive_jax.planning.sampling import SIZE, STEPS

MODEL = DiTConfig()
PACKED = 9 / 16
"""Bytes of a value in NVFP4 with its share of a scale."""


def kv_seconds(chip: Chip, *, slots: int, quantize_share: float) -> dict[str, float]:
    """Seconds per chunk: "quantize" once, and "dequantize" of past slots in every call.

    `quantize_share` is the modelled share of bandwidth of the quantize kernel on bfloat16 values.
    """
    values = MODEL.layers * math.prod(SIZE) * MODEL.dim
    search = 2 * values * (2 + PACKED) / quantize_share
    # Keys: mean, centring into float32 and amax of it. Values: amax. Both: write into the cache.
    passes = values * (2 + (2 + 4) + 4 + 2 + 2 * 2 * PACKED)
    read = 2 * values * slots * (STEPS + 1) * (PACKED + 2)
    return {
        "quantize": (search + passes) / chip.memory_bandwidth,
        "dequantize": read / chip.memory_bandwidth,
    }


def chunk_seconds(chip: Chip, *, slots: int, attention_share: float) -> float:
    """Seconds of a chunk's model calls without the cache's work."""
    tokens = math.prod(SIZE)
    linears = 2 * tokens * (6 * MODEL.dim**2 + 2 * MODEL.dim * MODEL.ffn_dim)
    attention = 4 * tokens * (tokens * (slots + 1) + MODEL.text_len) * MODEL.dim
    seconds = linears / SUSTAINED + attention / attention_share
    return (STEPS + 1) * MODEL.layers * seconds / chip.bf16_flops
