"""Softmax attention between the pairs that `tokens.visible` allows."""

from pallas_kernels.attention.api import AttentionFn, attention, attention_with_lse, which
from pallas_kernels.attention.layouts import Layout, lay_out

__all__ = ["AttentionFn", "Layout", "attention", "attention_with_lse", "lay_out", "which"]
