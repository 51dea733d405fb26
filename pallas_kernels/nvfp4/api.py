"""`quantize`, `dequantize` and `matmul`: argument checks and choice of implementation."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.dispatch import Implementation, Unsupported, capability, platform
from pallas_kernels.nvfp4 import products, reference
from pallas_kernels.nvfp4.format import BLOCK, NVFP4, RULES, Rule, dequantize_reference
from pallas_kernels.nvfp4.rounding import rounding_noise, seeds

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "xla", "mosaic")
FALLBACKS: dict[str, str] = {
    "quantize": "use implementation='xla'",
    "dequantize": "use implementation='xla'",
    "matmul": "use quant=fp8 or implementation='xla' (dequantizes)",
}
"""Operations, with the remedy where their kernel cannot run."""


def quantize(
    x: Float[Array, "*lead_rows k"],
    *,
    rule: Rule = "mse",
    block_rows: int = 1,
    lead: int = 0,
    amax: Float32[Array, "*lead"] | None = None,
    key: Array | None = None,
    transpose: bool = False,
    hadamard: bool = False,
    implementation: Implementation = "auto",
) -> NVFP4:
    """Quantizes x to NVFP4, with one scale per block of the last axis.

    NaN and infinity dequantize to NaN. With stochastic rounding, the mean over keys is x for
    static_4; for static_6 it is x except for a block's largest values, which clip where the scale
    was rounded down. Rules that search compare the rounded candidates, as published, and therefore
    prefer rounding noise that errs less.

    Args:
      x: values; bfloat16 or float32.
      rule: rule that chooses the scale of a block.
      block_rows: rows of a block, 1 or 16; a block has 16 columns.
      lead: number of leading axes whose entries each have an `amax`.
      amax: max |x| in float32, after the Hadamard transform if there is one; computed if None. Pass
        it if x is part of a larger tensor.
      key: PRNG key for stochastic rounding (`rounding.rounding_noise`); None rounds to nearest.
      transpose: swap the last two axes first.
      hadamard: rotate the last axis, after the transposition (`hadamard.rotate`).
      implementation: name of an implementation, or "auto".

    Raises ValueError if the contraction axis is not a multiple of 16 or if arguments do not match,
    and `Unsupported` if a named implementation cannot run.
    """
    check_quantize(x, rule, block_rows, lead, amax, transpose)
    chosen = select_implementation("quantize", x, implementation=implementation)
    # Mosaic kernels take an amax; the other implementations compute it.
    options = {"rule": rule, "block_rows": block_rows, "transpose": transpose, "hadamard": hadamard}
    if chosen == "mosaic":
        if amax is None:
            amax = reference.max_abs(reference.transpose_and_rotate(x, transpose, hadamard), lead)
        return _mosaic("quantize").quantize(x, amax, key=key, **options)
    run = _fused if chosen == "xla" else _stepwise
    return run(x, amax, key, lead=lead, **options)


def _stepwise(x: Array, amax: Array | None, key: Array | None, **options: Any) -> NVFP4:
    noise = None
    if key is not None:
        oriented = jnp.swapaxes(x, -1, -2) if options["transpose"] else x
        noise = rounding_noise(seeds(key), oriented.shape)
    return reference.quantize(x, amax=amax, noise=noise, **options)


_fused = jax.jit(_stepwise, static_argnames=("rule", "block_rows", "lead", "transpose", "hadamard"))
_dequantized = jax.jit(dequantize_reference, static_argnums=1)


def dequantize(
    a: NVFP4, dtype: jnp.dtype = jnp.bfloat16, *, implementation: Implementation = "auto"
) -> Float[Array, "*rows k"]:
    """The values of `a`, rounded once from float32; NaN where a scale or `amax` is NaN.

    Raises `Unsupported` if a named implementation cannot run.
    """
    chosen = select_implementation("dequantize", a, implementation=implementation)
    if chosen == "mosaic":
        return _mosaic("dequantize").dequantize(a, dtype)
    if chosen == "xla":
        return _dequantized(a, dtype)
    return dequantize_reference(a, dtype)


def matmul(
    a: NVFP4,
    b: NVFP4,
    *,
    bias: Float[Array, "n"] | None = None,
    low_rank: products.LowRankFactors | None = None,
    out_dtype: jnp.dtype = jnp.bfloat16,
    implementation: Implementation = "auto",
) -> Float[Array, "m n"]:
    """Computes a @ b^T with float32 accumulation, rounded once at the end.

    Args:
      a: matrix [m, k].
      b: matrix [n, k].
      bias: added in float32 before the rounding.
      low_rank: pair (xa [m, r], B [r, n]); adds xa @ B, multiplied in bfloat16 and accumulated in
        float32, before the rounding.
      out_dtype: dtype of the result.
      implementation: name of an implementation, or "auto".

    Raises ValueError if operands do not match, and `Unsupported` if a named implementation cannot
    run.
    """
    check_matmul(a, b, bias, low_rank)
    chosen = select_implementation("matmul", a, b, implementation=implementation)
    options: dict[str, Any] = {"bias": bias, "low_rank": low_rank, "out_dtype": out_dtype}
    if chosen == "mosaic":
        return _mosaic("matmul").matmul(a, b, **options)
    return (products.xla if chosen == "xla" else products.reference)(a, b, **options)


def select_implementation(
    op: str, *arguments: Any, implementation: Implementation = "auto", **keywords: Any
) -> Implementation:
    """The name of the implementation that operation `op` uses for these arguments.

    "auto" selects "xla"; "mosaic" has not run on a GPU yet and is used only if named. Raises
    ValueError for unknown names and `Unsupported` if the named implementation cannot run.
    """
    if op not in FALLBACKS:
        raise ValueError(f"NVFP4 has no op {op!r}; choose from {', '.join(FALLBACKS)}")
    if implementation == "auto":
        return "xla"
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"implementation {implementation!r}; choose from {known}")
    if implementation == "mosaic" and not capability().startswith("10."):
        chip = f"sm_{capability().replace('.', '')}" if platform() == "gpu" else platform()
        raise Unsupported(f"NVFP4 {op} needs Blackwell (sm_100); this is {chip}: {FALLBACKS[op]}")
    return implementation


def _mosaic(op: str) -> Any:
    """The module of an operation's kernel; it takes 0.5 s to import, so CPUs skip it."""
    return importlib.import_module(f"pallas_kernels.nvfp4.mosaic.{op}")


def check_quantize(
    x: Array, rule: str, block_rows: int, lead: int, amax: Array | None, transpose: bool
) -> None:
    """Raises ValueError if arguments of `quantize` are invalid or do not match."""
    if rule not in RULES:
        raise ValueError(f"NVFP4 rule {rule!r}; choose from {', '.join(RULES)}")
    if block_rows not in (1, BLOCK):
        raise ValueError(f"block_rows must be 1 or {BLOCK}, got {block_rows}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"NVFP4 needs floating-point values, got {x.dtype}")
    least = lead + (2 if transpose or block_rows > 1 else 1)
    if lead < 0 or x.ndim < least:
        raise ValueError(
            f"x must have >= {least} axes with {lead} leading axes, got shape {x.shape}"
        )
    if transpose and x.ndim != lead + 2:
        raise ValueError(f"lead must be {x.ndim - 2} to transpose shape {x.shape}, got {lead}")
    contraction = x.shape[-2 if transpose else -1]
    if contraction % BLOCK:
        raise ValueError(
            f"the contraction axis must be a multiple of {BLOCK}, got {contraction}; pad it with "
            "zeros or leave this product unquantized"
        )
    if amax is not None and jnp.shape(amax) != x.shape[:lead]:
        raise ValueError(
            f"amax must have shape {x.shape[:lead]} with lead={lead}, got {jnp.shape(amax)}"
        )


def check_matmul(
    a: NVFP4, b: NVFP4, bias: Array | None, low_rank: products.LowRankFactors | None
) -> None:
    """Raises ValueError if operands of `matmul` do not match."""
    for name, c in (("a", a), ("b", b)):
        if c.ndim != 2 or c.lead:
            raise ValueError(
                f"{name} must be a matrix with one amax, got shape {c.shape} and amax of shape "
                f"{c.amax.shape}"
            )
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"last axes differ: a has shape {a.shape}, b has shape {b.shape}")
    m, n = a.shape[0], b.shape[0]
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must have shape ({n},), got {bias.shape}")
    if low_rank is not None:
        x, y = (part.shape for part in low_rank)
        if len(x) != 2 or len(y) != 2 or x[0] != m or y[1] != n or x[1] != y[0]:
            raise ValueError(f"low_rank must have shapes ({m}, r) and (r, {n}), got {x} and {y}")
