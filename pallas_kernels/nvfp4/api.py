"""`quantize`, `dequantize` and `matmul`: argument checks and choice of implementation."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.catalog import kernels_of
from pallas_kernels.dispatch import (
    Implementation,
    Unsupported,
    capability,
    chips_of,
    launch_of,
    platform,
    proven,
)
from pallas_kernels.nvfp4 import products, reference
from pallas_kernels.nvfp4.format import (
    BLOCK,
    NVFP4,
    RULES,
    Rule,
    ScaleLayout,
    StochasticRounding,
    dequantize_reference,
    round_to,
    with_scale_layout,
)
from pallas_kernels.nvfp4.rounding import rounding_noise, seeds

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "xla", "mosaic")
FALLBACKS: dict[str, str] = {
    "quantize": "use implementation='xla'",
    "quantize_both": "use implementation='xla'",
    "statistics": "use implementation='xla'",
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
    stochastic: StochasticRounding = "unbiased",
    transpose: bool = False,
    hadamard: bool = False,
    scale_layout: ScaleLayout = "rows",
    implementation: Implementation = "auto",
) -> NVFP4:
    """Quantizes x to NVFP4, with one scale per block of the last axis; NaN and infinity give NaN.

    Args:
      x: values; bfloat16 or float32.
      rule: rule that chooses the scale of a block.
      block_rows: rows of a block, 1 or 16.
      lead: number of leading axes whose entries each have an `amax`.
      amax: max |x| of the whole tensor, after the Hadamard transform; computed from x if None.
      key: PRNG key for stochastic rounding (`rounding.rounding_noise`); None rounds to nearest.
      stochastic: kind of stochastic rounding; ignored without a key.
      transpose: swap the last two axes first.
      hadamard: rotate the last axis, after the transposition (`hadamard.rotate`).
      scale_layout: order of the result's scales; "tiles" needs a matrix per entry of `amax`.
      implementation: name of an implementation, or "auto".

    Raises ValueError if arguments do not match or the contraction axis is not a multiple of 16,
    `Unsupported` if a named implementation cannot run, NotImplementedError if differentiated.
    """
    check_quantize(x, rule, block_rows, lead, amax, transpose, scale_layout)
    x = _without_gradient(x)
    options: dict[str, Any] = {
        "rule": rule, "block_rows": block_rows, "stochastic": stochastic, "transpose": transpose,
        "hadamard": hadamard, "scale_layout": scale_layout,
    }  # fmt: skip
    chosen = select_implementation("quantize", x, implementation=implementation, key=key, **options)
    if chosen == "mosaic":
        if amax is None:
            amax = reference.max_abs(reference.transpose_and_rotate(x, transpose, hadamard), lead)
        return launch_of("quantize")(x, amax, key=key, **options)
    run = _fused if chosen == "xla" else _stepwise
    return run(x, amax, key, lead=lead, **options)


def _stepwise(
    x: Array, amax: Array | None, key: Array | None, *, scale_layout: ScaleLayout, **options: Any
) -> NVFP4:
    noise = None
    if key is not None:
        oriented = jnp.swapaxes(x, -1, -2) if options["transpose"] else x
        noise = rounding_noise(seeds(key), oriented.shape)
    return with_scale_layout(reference.quantize(x, amax=amax, noise=noise, **options), scale_layout)


_fused = jax.jit(
    _stepwise,
    static_argnames=(
        "rule", "block_rows", "stochastic", "lead", "transpose", "hadamard", "scale_layout",
    ),
)  # fmt: skip


def quantize_both(
    x: Float[Array, "m k"],
    amax: Float32[Array, ""],
    amax_transposed: Float32[Array, ""],
    *,
    rule: Rule = "mse",
    keys: tuple[Array | None, Array | None] = (None, None),
    stochastic: StochasticRounding = "unbiased",
    hadamard: bool = True,
    implementation: Implementation = "auto",
) -> tuple[NVFP4, NVFP4]:
    """Quantizes x and its transpose, which is rotated if `hadamard`, for two products.

    The kernel reads x once and writes scale tiles. `amax_transposed` is that of the rotated
    transpose (`statistics`); `keys` come in pairs. Raises like `quantize`.
    """
    for transpose in (False, True):
        check_quantize(x, rule, 1, 0, amax, transpose)
    x = _without_gradient(x)
    chosen = select_implementation("quantize_both", x, implementation=implementation, keys=keys)
    options: dict[str, Any] = {"rule": rule, "stochastic": stochastic}
    if chosen == "mosaic":
        rotated = (False, hadamard)
        run = launch_of("quantize_both")
        return run(x, amax, amax_transposed, keys=keys, hadamard=rotated, **options)
    options |= {"implementation": implementation}
    plain = quantize(x, amax=amax, key=keys[0], **options)
    options |= {"transpose": True, "hadamard": hadamard}
    return plain, quantize(x, amax=amax_transposed, key=keys[1], **options)


def statistics(
    x: Float[Array, "m k"], *, hadamard: bool, sums: bool, implementation: Implementation = "auto"
) -> tuple[Float32[Array, ""], Float32[Array, ""], Float32[Array, "k"] | None]:
    """max |x|, max |rotate(x^T)| and the sums of x over rows; the kernel reads x once.

    Without `hadamard` the second is the first; without `sums` the third is None. The maxima are NaN
    if there is a NaN. Raises ValueError unless m is a multiple of 16.
    """
    if x.ndim != 2 or x.shape[0] % BLOCK:
        raise ValueError(f"x must be a matrix of a multiple of {BLOCK} rows, got {x.shape}")
    if select_implementation("statistics", x, implementation=implementation) == "mosaic":
        return launch_of("statistics")(x, hadamard=hadamard, sums=sums)
    amax = reference.max_abs(x)
    rotated = reference.max_abs(reference.transpose_and_rotate(x, True, True)) if hadamard else amax
    return amax, rotated, jnp.sum(x.astype(jnp.float32), axis=0) if sums else None


def _with_offset(a: NVFP4, dtype: jnp.dtype, offset: Array | None = None) -> Array:
    if offset is None:
        return dequantize_reference(a, dtype)
    values = dequantize_reference(a, jnp.float32) + offset.astype(jnp.float32)
    return round_to(values, dtype)


_dequantized = jax.jit(_with_offset, static_argnums=1)


def dequantize(
    a: NVFP4,
    dtype: jnp.dtype = jnp.bfloat16,
    *,
    offset: Float[Array, "*rows k"] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "*rows k"]:
    """The values of `a`, rounded once from float32; NaN where a scale or `amax` is NaN.

    `offset` broadcasts against the values and is added before they are rounded. Raises
    `Unsupported` if a named implementation cannot run.
    """
    chosen = select_implementation("dequantize", a, implementation=implementation, offset=offset)
    if chosen == "mosaic":
        return launch_of("dequantize")(with_scale_layout(a, "rows"), dtype, offset)
    return (_dequantized if chosen == "xla" else _with_offset)(a, dtype, offset)


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
    options: dict[str, Any] = {"bias": bias, "low_rank": low_rank, "out_dtype": out_dtype}
    chosen = select_implementation("matmul", a, b, implementation=implementation, **options)
    if chosen == "mosaic":
        return launch_of("matmul")(a, b, **options)
    return (products.xla if chosen == "xla" else products.reference)(a, b, **options)


def select_implementation(
    op: str, *arguments: Any, implementation: Implementation = "auto", **keywords: Any
) -> Implementation:
    """The name of the implementation that operation `op` uses for these arguments.

    "auto" selects "mosaic" only where its kernel is proven for the arguments and `keywords`
    (`dispatch.proven`), else "xla". Raises ValueError for unknown names and `Unsupported` if the
    named implementation cannot run.
    """
    if op not in FALLBACKS:
        raise ValueError(f"NVFP4 has no op {op!r}; choose from {', '.join(FALLBACKS)}")
    if implementation == "auto":
        return "mosaic" if proven(op, *arguments, **keywords) else "xla"
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"implementation {implementation!r}; choose from {known}")
    if implementation == "mosaic" and not kernels_of(op, capability()):
        chip = f"sm_{capability().replace('.', '')}" if platform() == "gpu" else platform()
        raise Unsupported(f"NVFP4 {op} needs {chips_of(op)}; this is {chip}: {FALLBACKS[op]}")
    return implementation


def linear_implementation(implementation: Implementation, *, trains: bool) -> Implementation:
    """The implementation of all operations of a linear; "auto" is resolved once for all of them.

    "auto" is "mosaic" only where the kernels of every operation are proven. Raises like
    `select_implementation`.
    """
    ops: dict[str, dict[str, Any]] = {"quantize": {"scale_layout": "tiles"}, "matmul": {}}
    if trains:
        ops = {"statistics": {}, "quantize_both": {}, "matmul": {}}
    chosen = {
        select_implementation(op, implementation=implementation, **how) for op, how in ops.items()
    }
    return chosen.pop() if len(chosen) == 1 else "xla"


@jax.custom_vjp
def _without_gradient(x: Array) -> Array:
    """x; raises NotImplementedError if differentiated, where rounding would give silent zeros."""
    return x


def _refuse_gradient(x: Array) -> Any:
    raise NotImplementedError(
        "quantization to NVFP4 has no gradient: use `stop_gradient`, or a product that has one "
        "(`quant.recipe.product` to train a matrix, `PackedKernel.product` for a frozen one)"
    )


_without_gradient.defvjp(_refuse_gradient, lambda _saved, grad: (grad,))


def check_quantize(
    x: Array,
    rule: str,
    block_rows: int,
    lead: int,
    amax: Array | None,
    transpose: bool,
    scale_layout: ScaleLayout = "rows",
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
    if scale_layout == "tiles" and x.ndim != lead + 2:
        raise ValueError(f"lead must be {x.ndim - 2} for scale tiles of {x.shape}, got {lead}")
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
