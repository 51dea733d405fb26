"""Held-out scripts, sampled and judged."""
