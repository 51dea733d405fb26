"""Softmax attention masked by `tokens.visible`."""

from pallas_kernels.attention.api import (
    AttentionFn,
    attention,
    attention_with_lse,
    select_implementation,
)
from pallas_kernels.attention.fixed_mask import FixedMaskAttention, make_attention

__all__ = [
    "AttentionFn",
    "FixedMaskAttention",
    "attention",
    "attention_with_lse",
    "make_attention",
    "select_implementation",
]
