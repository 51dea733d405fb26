"""The catalog of all Mosaic kernels, and how to build each at the sizes of the 5B model.

A kernel is "interpreted" (compared with the reference in Pallas' interpreter, which also detects
races), "compiled" (for a chip that need not be present) or "run" (on such a chip). The catalog
holds what is needed to compile; `longlive kernels check` does so.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nvfp4.format import BLOCK, CODE_DTYPE, NVFP4, SCALE_DTYPE
from pallas_kernels.tokens import Tokens, make

Build = Callable[[], tuple[Callable, tuple]]
"""Builds a kernel call: (callable, abstract arguments)."""
BLACKWELL, HOPPER = ("sm_100a",), ("sm_90a",)
TO_E2M1 = (r"F2FP\.SATFINITE\.E2M1\.",)
FROM_E2M1 = (r"F2FP\.F16\.E2M1\.",)
TOKENS, DIM, HEADS, WIDTH = 7040, 3072, 24, 128
"""Tokens of a chunk of eight latent frames; channels, heads and head width of the 5B model."""
MODULES = ("nvfp4.mosaic.matmul", "attention.mosaic.packed_op")
"""Modules with their own CATALOG: name -> (chips, build, instructions)."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One kernel, or the few kernels that one function launches.

    Attributes:
      chips: target architectures ("sm_90a", "sm_100a").
      build: returns a function and abstract arguments; tracing the function launches the kernel.
      instructions: patterns of SASS instructions that the machine code must contain.
    """

    chips: tuple[str, ...]
    build: Build
    instructions: tuple[str, ...]


@functools.cache
def catalog() -> Mapping[str, Entry]:
    """All kernels by name."""
    entries = dict(_ATTENTION | _NVFP4)
    for name in MODULES:
        module = importlib.import_module(f"pallas_kernels.{name}")
        entries |= {kernel: Entry(*entry) for kernel, entry in module.CATALOG.items()}
    return MappingProxyType(entries)


def _attention(tokens: Tokens, q: Any, k: Any, v: Any) -> Any:
    from pallas_kernels.attention import attention_with_lse

    return attention_with_lse(q, k, v, tokens, tokens, implementation="mosaic")


def _forward() -> tuple[Callable, tuple]:
    x, tokens = _heads()
    return functools.partial(_attention, tokens), (x, x, x)


def _gradients() -> tuple[Callable, tuple]:
    """Forward and backward pass: three kernels, for the output, for dq, and for dk and dv."""
    x, tokens = _heads()

    def gradients(q, k, v, grad):
        (out, lse), pull = jax.vjp(functools.partial(_attention, tokens), q, k, v)
        return out, pull((grad, lse))

    return gradients, (x, x, x, x)


def _heads() -> tuple[jax.ShapeDtypeStruct, Tokens]:
    """Operands of two heads and four block-causal chunks; no kernel depends on either number."""
    length = 1024
    tokens = make(np.zeros((length, 3), np.int32), np.arange(length) // (length // 4), False)
    return jax.ShapeDtypeStruct((1, length, 2, WIDTH), jnp.bfloat16), tokens


def _quantize(
    rows: int = TOKENS, *, stochastic: bool = False, dtype=jnp.bfloat16, **options
) -> Build:
    def build() -> tuple[Callable, tuple]:
        from pallas_kernels.nvfp4.mosaic.quantize import quantize

        shapes = jax.ShapeDtypeStruct((rows, DIM), dtype), jax.ShapeDtypeStruct((), jnp.float32)
        if not stochastic:
            return functools.partial(quantize, **options), shapes
        return lambda x, amax, key: quantize(x, amax, key=key, **options), (*shapes, _key())

    return build


def _quantize_both(*, stochastic: bool) -> Build:
    def build() -> tuple[Callable, tuple]:
        from pallas_kernels.nvfp4.mosaic.quantize import quantize_both

        x, amax = jax.ShapeDtypeStruct((TOKENS, DIM), jnp.bfloat16), jax.ShapeDtypeStruct((), "f4")
        if not stochastic:
            return quantize_both, (x, amax, amax)
        return (
            lambda x, amax, amax_t, *keys: quantize_both(x, amax, amax_t, keys=keys),
            (x, amax, amax, _key(), _key()),
        )

    return build


def _key() -> Any:
    return jax.eval_shape(jax.random.key, 0)


def _dequantize() -> tuple[Callable, tuple]:
    from pallas_kernels.nvfp4.mosaic.dequantize import dequantize

    return dequantize, (_packed((TOKENS, DIM), ()),)


def _dequantize_slots() -> tuple[Callable, tuple]:
    from pallas_kernels.nvfp4.mosaic.dequantize import dequantize_slots

    cache = _packed((4, TOKENS * HEADS, WIDTH), (4,))
    return dequantize_slots, (cache, jax.ShapeDtypeStruct((3,), jnp.int32))


def _packed(shape: tuple[int, ...], lead: tuple[int, ...]) -> NVFP4:
    kinds = (
        (shape, CODE_DTYPE),
        ((*shape[:-1], shape[-1] // BLOCK), SCALE_DTYPE),
        (lead, jnp.float32),
    )
    leaves: list[Any] = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
    codes, scales, amax = leaves
    return NVFP4(codes, scales, amax, "mse")


_ATTENTION = {
    "attention_forward_hopper": Entry(HOPPER, _forward, (r"HGMMA\.",)),
    "attention_gradients_hopper": Entry(HOPPER, _gradients, (r"HGMMA\.",)),
    "attention_forward_blackwell": Entry(BLACKWELL, _forward, (r"UTCHMMA",)),
    "attention_gradients_blackwell": Entry(BLACKWELL, _gradients, (r"UTCHMMA",)),
}
_NVFP4 = {
    "nvfp4_quantize": Entry(BLACKWELL, _quantize(), TO_E2M1),
    "nvfp4_quantize_static": Entry(BLACKWELL, _quantize(rule="static_6"), TO_E2M1),
    "nvfp4_quantize_stochastic": Entry(BLACKWELL, _quantize(stochastic=True), TO_E2M1),
    "nvfp4_quantize_rotated": Entry(BLACKWELL, _quantize(hadamard=True), TO_E2M1),
    "nvfp4_quantize_transposed": Entry(BLACKWELL, _quantize(transpose=True), TO_E2M1),
    "nvfp4_quantize_both": Entry(BLACKWELL, _quantize_both(stochastic=False), TO_E2M1),
    "nvfp4_quantize_both_stochastic": Entry(BLACKWELL, _quantize_both(stochastic=True), TO_E2M1),
    "nvfp4_quantize_squares": Entry(
        BLACKWELL, _quantize(DIM, dtype=jnp.float32, block_rows=BLOCK), TO_E2M1
    ),
    "nvfp4_dequantize": Entry(BLACKWELL, _dequantize, FROM_E2M1),
    "nvfp4_dequantize_slots": Entry(BLACKWELL, _dequantize_slots, FROM_E2M1),
}
