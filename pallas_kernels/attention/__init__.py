"""Softmax attention between the pairs that `tokens.visible` allows."""

from pallas_kernels.attention.api import AttentionFn, attention, which

__all__ = ["AttentionFn", "attention", "which"]
