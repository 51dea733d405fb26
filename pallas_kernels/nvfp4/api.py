"""quantize(), dequantize(), matmul(): checks, and the choice of implementation."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.dispatch import Implementation, Unsupported, capability, platform
from pallas_kernels.nvfp4 import products, reference
from pallas_kernels.nvfp4.format import BLOCK, NVFP4, RULES, Rule, dequantize_reference
from pallas_kernels.nvfp4.rounding import draws, seeds

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "xla", "mosaic")
OPS: dict[str, str] = {
    "quantize": "use implementation='xla'",
    "dequantize": "use implementation='xla'",
    "matmul": "use quant=fp8 or implementation='xla' (dequantizes)",
}
"""What this module does, with what to do where its kernel does not run."""


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
    """x as NVFP4, in blocks of `block_rows` (1 or 16) rows by 16 of the last axis.

    `lead` leading axes have an `amax` for each entry: max |x| in float32, after the Hadamard
    transform if there is one, or the given one, as for an `x` that is part of something larger. A
    `key` asks for stochastic rounding (`rounding.draws`) instead of to the nearest. `transpose`
    swaps the last two axes first, `hadamard` then rotates the last one (`hadamard.rotate`).
    NaN and infinity come out as NaN.

    The mean over keys is x for static_4, for static_6 but for what rounding a scale down cuts off
    a block's largest numbers. Rules that search compare what was rounded, as published, and so
    prefer draws that err less.

    Raises ValueError for a contraction axis that is no multiple of 16 and for arguments that do
    not fit, `Unsupported` where a named implementation cannot run.
    """
    check_quantize(x, rule, block_rows, lead, amax, transpose)
    chosen = which("quantize", x, implementation=implementation)
    options = {"rule": rule, "block_rows": block_rows, "transpose": transpose, "hadamard": hadamard}
    if chosen == "mosaic":
        if amax is None:
            amax = reference.largest(reference.oriented(x, transpose, hadamard), lead)
        return _mosaic("quantize").quantize(x, amax, key=key, **options)
    run = _fused if chosen == "xla" else _stepwise
    return run(x, amax, key, lead=lead, **options)


def _stepwise(x: Array, amax: Array | None, key: Array | None, **options: Any) -> NVFP4:
    by = None
    if key is not None:
        turned = jnp.swapaxes(x, -1, -2) if options["transpose"] else x
        by = draws(seeds(key), turned.shape)
    return reference.quantize(x, amax=amax, draws=by, **options)


_fused = jax.jit(_stepwise, static_argnames=("rule", "block_rows", "lead", "transpose", "hadamard"))
_dequantized = jax.jit(dequantize_reference, static_argnums=1)


def dequantize(
    a: NVFP4, dtype: jnp.dtype = jnp.bfloat16, *, implementation: Implementation = "auto"
) -> Float[Array, "*rows k"]:
    """The values of `a`, rounded once from float32; NaN where a scale or `amax` is NaN."""
    chosen = which("dequantize", a, implementation=implementation)
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
    low_rank: products.LowRank | None = None,
    out_dtype: jnp.dtype = jnp.bfloat16,
    implementation: Implementation = "auto",
) -> Float[Array, "m n"]:
    """a @ b^T of `a` [m, k] and `b` [n, k], accumulated in float32 and rounded once at the end.

    `low_rank` (xa [m, r], B [r, n]) adds xa @ B, multiplied in bfloat16 and accumulated in
    float32, and `bias` is added in float32, both before that rounding. Raises ValueError for
    operands that do not fit, `Unsupported` where a named implementation cannot run.
    """
    check_matmul(a, b, bias, low_rank)
    chosen = which("matmul", a, b, implementation=implementation)
    options: dict[str, Any] = {"bias": bias, "low_rank": low_rank, "out_dtype": out_dtype}
    if chosen == "mosaic":
        return _mosaic("matmul").matmul(a, b, **options)
    return (products.xla if chosen == "xla" else products.reference)(a, b, **options)


def which(
    op: str, *arguments: Any, implementation: Implementation = "auto", **keywords: Any
) -> Implementation:
    """The implementation that the op of this name uses for these arguments, by name.

    "auto" is "xla"; "mosaic" has not run on a GPU yet and so is only taken by name.
    """
    if op not in OPS:
        raise ValueError(f"NVFP4 has no op {op!r}; choose from {', '.join(OPS)}")
    if implementation == "auto":
        return "xla"
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"implementation {implementation!r}; choose from {known}")
    if implementation == "mosaic" and not capability().startswith("10."):
        found = f"sm_{capability().replace('.', '')}" if platform() == "gpu" else platform()
        raise Unsupported(f"NVFP4 {op} needs Blackwell (sm_100); this is {found}: {OPS[op]}")
    return implementation


def _mosaic(op: str) -> Any:
    """The module of an op's kernel: half a second that CPUs need not spend."""
    return importlib.import_module(f"pallas_kernels.nvfp4.mosaic.{op}")


def check_quantize(
    x: Array, rule: str, block_rows: int, lead: int, amax: Array | None, transpose: bool
) -> None:
    """Raises ValueError for arguments of `quantize` that do not fit."""
    if rule not in RULES:
        raise ValueError(f"NVFP4 rule {rule!r}; choose from {', '.join(RULES)}")
    if block_rows not in (1, BLOCK):
        raise ValueError(f"NVFP4 blocks of {block_rows} rows; they have 1 or {BLOCK}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"NVFP4 of {x.dtype}; give floating-point values")
    least = lead + (2 if transpose or block_rows > 1 else 1)
    if lead < 0 or x.ndim < least:
        raise ValueError(
            f"an array of shape {x.shape} with {lead} leading axes; it needs {least} axes"
        )
    if transpose and x.ndim != lead + 2:
        raise ValueError(f"transposing {x.shape}: lead must be {x.ndim - 2}, it is {lead}")
    contraction = x.shape[-2 if transpose else -1]
    if contraction % BLOCK:
        raise ValueError(
            f"the contraction axis has {contraction} entries, no multiple of {BLOCK}; pad it with "
            "zeros or leave this product unquantized"
        )
    if amax is not None and jnp.shape(amax) != x.shape[:lead]:
        raise ValueError(f"amax has shape {jnp.shape(amax)}; lead={lead} wants {x.shape[:lead]}")


def check_matmul(a: NVFP4, b: NVFP4, bias: Array | None, low_rank: products.LowRank | None) -> None:
    """Raises ValueError for arguments of `matmul` that do not fit."""
    for name, c in (("a", a), ("b", b)):
        if c.ndim != 2 or c.lead:
            raise ValueError(
                f"{name} has shape {c.shape} and amax {c.amax.shape}; NVFP4 matmul takes matrices "
                "with one amax each"
            )
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a @ b^T of {a.shape} and {b.shape}: last axes differ")
    m, n = a.shape[0], b.shape[0]
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias has shape {bias.shape}, not ({n},)")
    if low_rank is not None:
        x, y = (part.shape for part in low_rank)
        if len(x) != 2 or len(y) != 2 or x[0] != m or y[1] != n or x[1] != y[0]:
            raise ValueError(f"low_rank has shapes {x} and {y}, not ({m}, r) and (r, {n})")
