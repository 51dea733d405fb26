"""All Mosaic kernels, with what a compiler needs to know to build each at the 5B model's sizes.

A kernel can be "interpreted" (its numbers compared with the oracle's in Pallas' interpreter, which
also looks for races), "compiled" (for a chip that is not there) or "run". This table says how to
do the second; `longlive kernels check` does it.
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

from pallas_kernels.nvfp4.format import BLOCK, CODE, NVFP4, SCALE
from pallas_kernels.tokens import Tokens, make

Build = Callable[[], tuple[Callable, tuple]]
BLACKWELL, HOPPER = ("sm_100a",), ("sm_90a",)
TO_E2M1 = (r"F2FP\.SATFINITE\.E2M1\.",)
FROM_E2M1 = (r"F2FP\.F16\.E2M1\.",)
TOKENS, DIM, HEADS, WIDTH = 7040, 3072, 24, 128
"""A chunk of eight latent frames, the channels of the 5B model, and its heads."""
MODULES = ("nvfp4.mosaic.matmul", "attention.mosaic.packed_op")
"""Those with a CATALOG of their own: name -> (chips, build, instructions)."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One kernel, or the few that one function launches.

    Attributes:
      chips: architectures it is for.
      build: gives a function and abstract arguments, so that tracing it launches the kernel.
      instructions: patterns of those it is written for, all of them to be in its machine code.
    """

    chips: tuple[str, ...]
    build: Build
    instructions: tuple[str, ...]


@functools.cache
def catalog() -> Mapping[str, Entry]:
    """Kernels by name."""
    found = dict(_ATTENTION | _NVFP4)
    for name in MODULES:
        module = importlib.import_module(f"pallas_kernels.{name}")
        found |= {kernel: Entry(*entry) for kernel, entry in module.CATALOG.items()}
    return MappingProxyType(found)


def _attention(tokens: Tokens, q: Any, k: Any, v: Any) -> Any:
    from pallas_kernels.attention import attention_with_lse

    return attention_with_lse(q, k, v, tokens, tokens, implementation="mosaic")


def _forward() -> tuple[Callable, tuple]:
    x, tokens = _heads()
    return functools.partial(_attention, tokens), (x, x, x)


def _gradients() -> tuple[Callable, tuple]:
    """The output, dq, dk and dv: three kernels."""
    x, tokens = _heads()

    def gradients(q, k, v, grad):
        (out, lse), pull = jax.vjp(functools.partial(_attention, tokens), q, k, v)
        return out, pull((grad, lse))

    return gradients, (x, x, x, x)


def _heads() -> tuple[jax.ShapeDtypeStruct, Tokens]:
    """Two heads and four chunks, each of which sees those before it: kernels do not depend on the
    number of either."""
    length = 1024
    tokens = make(np.zeros((length, 3), np.int32), np.arange(length) // (length // 4), False)
    return jax.ShapeDtypeStruct((1, length, 2, WIDTH), jnp.bfloat16), tokens


def _quantize(rows: int = TOKENS, *, random: bool = False, dtype=jnp.bfloat16, **options) -> Build:
    def build() -> tuple[Callable, tuple]:
        from pallas_kernels.nvfp4.mosaic.quantize import quantize

        shapes = jax.ShapeDtypeStruct((rows, DIM), dtype), jax.ShapeDtypeStruct((), jnp.float32)
        if not random:
            return functools.partial(quantize, **options), shapes
        return lambda x, amax, key: quantize(x, amax, key=key, **options), (*shapes, _key())

    return build


def _both(*, random: bool) -> Build:
    def build() -> tuple[Callable, tuple]:
        from pallas_kernels.nvfp4.mosaic.quantize import quantize_both

        x, amax = jax.ShapeDtypeStruct((TOKENS, DIM), jnp.bfloat16), jax.ShapeDtypeStruct((), "f4")
        if not random:
            return quantize_both, (x, amax, amax)
        return (
            lambda x, amax, turned, *keys: quantize_both(x, amax, turned, keys=keys),
            (x, amax, amax, _key(), _key()),
        )

    return build


def _key() -> Any:
    return jax.eval_shape(jax.random.key, 0)


def _dequantize() -> tuple[Callable, tuple]:
    from pallas_kernels.nvfp4.mosaic.dequantize import dequantize

    return dequantize, (_packed((TOKENS, DIM), ()),)


def _slots() -> tuple[Callable, tuple]:
    from pallas_kernels.nvfp4.mosaic.dequantize import dequantize_slots

    cache = _packed((4, TOKENS * HEADS, WIDTH), (4,))
    return dequantize_slots, (cache, jax.ShapeDtypeStruct((3,), jnp.int32))


def _packed(shape: tuple[int, ...], lead: tuple[int, ...]) -> NVFP4:
    kinds = (shape, CODE), ((*shape[:-1], shape[-1] // BLOCK), SCALE), (lead, jnp.float32)
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
    "nvfp4_quantize_stochastic": Entry(BLACKWELL, _quantize(random=True), TO_E2M1),
    "nvfp4_quantize_rotated": Entry(BLACKWELL, _quantize(hadamard=True), TO_E2M1),
    "nvfp4_quantize_transposed": Entry(BLACKWELL, _quantize(transpose=True), TO_E2M1),
    "nvfp4_quantize_both": Entry(BLACKWELL, _both(random=False), TO_E2M1),
    "nvfp4_quantize_both_stochastic": Entry(BLACKWELL, _both(random=True), TO_E2M1),
    "nvfp4_quantize_squares": Entry(
        BLACKWELL, _quantize(DIM, dtype=jnp.float32, block_rows=BLOCK), TO_E2M1
    ),
    "nvfp4_dequantize": Entry(BLACKWELL, _dequantize, FROM_E2M1),
    "nvfp4_dequantize_slots": Entry(BLACKWELL, _slots, FROM_E2M1),
}
