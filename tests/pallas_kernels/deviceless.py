"""Compilation without a GPU, for the tests of kernels."""

from longlive_jax.planning.deviceless import (
    SHARED_MEMORY,
    TENSOR_COLUMNS,
    compile_for,
    inspect,
    prepare,
    refusal,
)

__all__ = ["SHARED_MEMORY", "TENSOR_COLUMNS", "compile_for", "inspect", "prepare", "refusal"]
