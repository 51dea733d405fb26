"""Softmax attention masked by `tokens.visible`."""

from pallas_kernels.attention.api import (
    LAST_RESORT,
    AttentionFn,
    attention,
    attention_with_lse,
    describe,
    select_implementation,
)
from pallas_kernels.attention.fixed_mask import FixedMaskAttention, make_attention

__all__ = [
    "LAST_RESORT",
    "AttentionFn",
    "FixedMaskAttention",
    "attention",
    "attention_with_lse",
    "describe",
    "make_attention",
    "select_implementation",
]
