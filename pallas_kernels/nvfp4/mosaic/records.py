"""Records of the NVFP4 kernels: quantize, dequantize, product."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.kernel import BLACKWELL, Build, Cost, Kernel
from pallas_kernels.nvfp4 import products, reference
from pallas_kernels.nvfp4.format import (
    BLOCK,
    CODE_DTYPE,
    NVFP4,
    SCALE_DTYPE,
    ScaleLayout,
    dequantize_reference,
    with_scale_layout,
)
from pallas_kernels.nvfp4.mosaic import cases, matmul
from pallas_kernels.nvfp4.mosaic.dequantize import dequantize
from pallas_kernels.nvfp4.mosaic.quantize import quantize, quantize_both
from pallas_kernels.nvfp4.mosaic.statistics import statistics
from pallas_kernels.nvfp4.rounding import rounding_noise, seeds

TO_E2M1 = (r"F2FP\.SATFINITE\.E2M1\.",)
FROM_E2M1 = (r"F2FP\.F16\.E2M1\.",)
TOKENS, DIM, HEADS, WIDTH = cases.TOKENS, cases.DIM, cases.HEADS, cases.WIDTH
CHIP_ROUNDING = 1e-2
"""Relative error of codes and scales on a chip, whose divisions may round a block's scale to the
neighbouring one."""


def quantize_oracle(
    x,
    amax,
    key=None,
    *,
    transpose: bool = False,
    scale_layout: ScaleLayout = "rows",
    **options: Any,
) -> NVFP4:
    """`reference.quantize`, with the noise that a key stands for."""
    noise = None
    if key is not None:
        noise = rounding_noise(seeds(key), (jnp.swapaxes(x, -1, -2) if transpose else x).shape)
    quantized = reference.quantize(
        x, amax=amax, lead=amax.ndim, noise=noise, transpose=transpose, **options
    )
    return with_scale_layout(quantized, scale_layout)


def both_oracle(x, amax, amax_t, *keys) -> tuple[NVFP4, NVFP4]:
    first, second = keys or (None, None)
    tiled: Any = {"scale_layout": "tiles"}
    turned = quantize_oracle(x, amax_t, second, transpose=True, hadamard=True, **tiled)
    return quantize_oracle(x, amax, first, **tiled), turned


def statistics_oracle(x) -> tuple[Any, Any, Any]:
    rotated = reference.max_abs(reference.transpose_and_rotate(x, True, True))
    return reference.max_abs(x), rotated, jnp.sum(x.astype(jnp.float32), axis=0)


def run_statistics(x, *, interpret=None, **tiles: Any):
    return statistics(x, hadamard=True, sums=True, interpret=interpret)


def quantize_cost(x, *rest: Any) -> Cost:
    return Cost(x.size * jnp.dtype(x.dtype).itemsize + x.size * 9 // 16)


def both_cost(x, *rest: Any) -> Cost:
    return Cost(x.size * jnp.dtype(x.dtype).itemsize + x.size * 9 // 8)


def dequantize_cost(a: NVFP4) -> Cost:
    """Codes and scales in, bfloat16 out."""
    return Cost(a.size * 9 // 16 + 2 * a.size)


def dequantize_offset_cost(a: NVFP4, offset) -> Cost:
    return Cost(dequantize_cost(a).bytes + 2 * offset.size)


def product_cost(a: NVFP4, b: NVFP4, bias, *low_rank) -> Cost:
    (m, k), n = a.shape, b.shape[0]
    rank = low_rank[0].shape[1] if low_rank else 0
    moved = (a.size + b.size) * 9 // 16 + 2 * m * n + 4 * n + 2 * rank * (m + n)
    # A branch runs at a quarter of the rate, so its operations count four times.
    return Cost(moved, 2 * m * n * (k + 4 * rank), flops_format="nvfp4")


def product(a, b, bias, *low_rank, interpret=None, collective=None, **tiles: Any):
    return matmul.matmul(
        a, b, bias=bias, low_rank=low_rank or None, interpret=interpret, collective=collective
    )


def product_oracle(a, b, bias, *low_rank):
    return products.reference(a, b, bias=bias, low_rank=low_rank or None)


def _any_arguments(*arguments: Any, **options: Any) -> None:
    """The kernels take all arguments that `nvfp4.api` accepts."""


def _no_rotated_squares(*arguments: Any, **options: Any) -> str | None:
    if options.get("block_rows", 1) > 1 and options.get("hadamard"):
        return "rotated NVFP4 squares have no kernel"
    return None


def _product_refusal(*operands: Any, **options: Any) -> str | None:
    return matmul.refusal(*operands[:2], **options) if operands else None


DEFAULTS = {
    "rule": "mse",
    "block_rows": 1,
    "transpose": False,
    "hadamard": False,
    "scale_layout": "rows",
    "stochastic": "unbiased",
}


def _covers(options: Mapping[str, Any], stochastic: bool) -> Callable[..., bool]:
    """Whether arguments of `quantize` are those of one form."""

    def covers(*arguments: Any, key: Any = None, **given: Any) -> bool:
        chosen = {name: given.get(name, default) for name, default in DEFAULTS.items()}
        return chosen == {**DEFAULTS, **options} and (key is not None) == stochastic

    return covers


def _quantize(
    form: str, *, stochastic: bool = False, rows: int = TOKENS, dtype=jnp.bfloat16, **options: Any
) -> Kernel:
    """The record of a form of `quantize` that fixes `options`."""

    def build() -> tuple[Callable, tuple]:
        shapes = jax.ShapeDtypeStruct((rows, DIM), dtype), jax.ShapeDtypeStruct((), jnp.float32)
        return run, (*shapes, _key()) if stochastic else shapes

    def run(x, amax, key=None, *, interpret=None, **tiles: Any):
        return quantize(x, amax, key=key, interpret=interpret, **options)

    return Kernel(
        f"nvfp4_quantize{form}",
        op="quantize",
        chips=BLACKWELL,
        build=build,
        refusal=_no_rotated_squares,
        run=run if form else _general_quantize,
        oracle=functools.partial(quantize_oracle, **options),
        cases=cases.quantize_cases(stochastic, dtype, **options),
        tiles={},
        cost=quantize_cost,
        instructions=TO_E2M1,
        production=functools.partial(cases.quantize_production, rows, stochastic, dtype, **options),
        modules=("nvfp4.mosaic.quantize",),
        launch=quantize,
        device_tolerance=CHIP_ROUNDING,
        covers=_covers(options, stochastic),
    )


def _general_quantize(x, amax, key=None, *, interpret=None, **options: Any) -> NVFP4:
    return quantize(x, amax, key=key, interpret=interpret, **options)


def _quantize_both(form: str, *, stochastic: bool) -> Kernel:
    def run(x, amax, amax_t, *keys, interpret=None, **tiles: Any):
        return quantize_both(x, amax, amax_t, keys=keys or (None, None), interpret=interpret)

    def build() -> tuple[Callable, tuple]:
        x, amax = jax.ShapeDtypeStruct((TOKENS, DIM), jnp.bfloat16), jax.ShapeDtypeStruct((), "f4")
        return run, (x, amax, amax, *((_key(), _key()) if stochastic else ()))

    return Kernel(
        f"nvfp4_quantize_both{form}",
        op="quantize_both",
        chips=BLACKWELL,
        build=build,
        refusal=_any_arguments,
        run=run,
        oracle=both_oracle,
        cases=cases.both_cases(stochastic),
        tiles={},
        cost=both_cost,
        instructions=TO_E2M1,
        production=functools.partial(cases.both_production, stochastic),
        modules=("nvfp4.mosaic.quantize",),
        launch=quantize_both,
        device_tolerance=CHIP_ROUNDING,
        covers=lambda *arguments, keys=(None, None), **_: (keys[0] is not None) == stochastic,
    )


def _key() -> Any:
    return jax.eval_shape(jax.random.key, 0)


def _build_dequantize() -> tuple[Callable, tuple]:
    return dequantize, (_packed((TOKENS, DIM), ()),)


def dequantize_offset(a: NVFP4, offset, *, interpret=None, **tiles: Any):
    return dequantize(a, jnp.bfloat16, offset, interpret=interpret)


def dequantize_offset_oracle(a: NVFP4, offset):
    return (dequantize_reference(a, jnp.float32) + offset.astype(jnp.float32)).astype(jnp.bfloat16)


def _build_offset() -> tuple[Callable, tuple]:
    keys = _packed((3, TOKENS, HEADS, WIDTH), (3,))
    return dequantize_offset, (keys, jax.ShapeDtypeStruct((3, 1, HEADS, WIDTH), jnp.bfloat16))


def _packed(shape: tuple[int, ...], lead: tuple[int, ...]) -> NVFP4:
    kinds = (
        (shape, CODE_DTYPE),
        ((*shape[:-1], shape[-1] // BLOCK), SCALE_DTYPE),
        (lead, jnp.float32),
    )
    leaves: list[Any] = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
    codes, scales, amax = leaves
    return NVFP4(codes, scales, amax, "mse")


def build_product(m: int, n: int, k: int, *, rank: int = 0, **how: Any) -> Build:
    """Returns a builder of (callable, abstract arguments) for a product with a bias."""

    def build() -> tuple[Callable, tuple]:
        array: Any = jax.ShapeDtypeStruct

        def run(a, b, bias, *low_rank):
            return matmul.matmul(a, b, bias=bias, low_rank=low_rank or None, **how)

        branch = (array((m, rank), jnp.float32), array((rank, n), jnp.bfloat16)) if rank else ()
        return run, (_packed((m, k), ()), _packed((n, k), ()), array((n,), jnp.float32), *branch)

    return build


def _product(
    form: str, size: tuple[int, int, int], pattern: tuple[str, ...], *, rank: int = 0, pairs: bool
) -> Kernel:
    return Kernel(
        f"nvfp4_matmul{form}",
        op="matmul",
        chips=BLACKWELL,
        build=build_product(*size, rank=rank, collective=pairs),
        refusal=_product_refusal,
        run=functools.partial(product, collective=pairs),
        oracle=product_oracle,
        # The interpreter has no pairs of multiprocessors; a branch is tested on single ones.
        cases=cases.product_cases(rank),
        tiles={},
        cost=product_cost,
        instructions=pattern,
        production=functools.partial(cases.product_production, *size, rank),
        modules=("nvfp4.mosaic.matmul",),
        launch=matmul.matmul,
        tolerance=0.0,
        device_tolerance=5e-3,
        not_interpreted="the interpreter does not support pairs of multiprocessors"
        if pairs
        else None,
        covers=lambda *operands, low_rank=None, **_: (low_rank is not None) == (rank > 0),
    )


SINGLE = r"UTCOMMA(?!\.2CTA)[.\w]*\.4X"
"""SASS pattern of a product with one scale per 16 values, by single thread blocks."""
PAIRS = r"UTCOMMA\.2CTA[.\w]*\.4X"
"""SASS pattern of the same product by pairs of thread blocks."""
KERNELS = (
    _quantize(""),
    _quantize("_static", rule="static_6"),
    _quantize("_stochastic", stochastic=True),
    _quantize("_rotated", hadamard=True),
    _quantize("_transposed", transpose=True),
    _quantize("_tiles", scale_layout="tiles"),
    _quantize_both("", stochastic=False),
    _quantize_both("_stochastic", stochastic=True),
    Kernel(
        "nvfp4_statistics",
        op="statistics",
        chips=BLACKWELL,
        build=lambda: (run_statistics, (jax.ShapeDtypeStruct((TOKENS, DIM), jnp.bfloat16),)),
        refusal=_any_arguments,
        run=run_statistics,
        oracle=statistics_oracle,
        cases=cases.statistics_cases(),
        tiles={},
        cost=lambda x: Cost(x.size * jnp.dtype(x.dtype).itemsize),
        instructions=(r"FMNMX|VIMNMX|IMNMX",),
        production=cases.statistics_production,
        modules=("nvfp4.mosaic.statistics",),
        launch=statistics,
        tolerance=1e-6,
        device_tolerance=1e-5,
    ),
    _quantize("_squares", rows=DIM, dtype=jnp.float32, block_rows=BLOCK),
    Kernel(
        "nvfp4_dequantize",
        op="dequantize",
        chips=BLACKWELL,
        build=_build_dequantize,
        refusal=_any_arguments,
        run=dequantize,
        oracle=functools.partial(dequantize_reference, dtype=jnp.bfloat16),
        cases=cases.dequantize_cases(),
        tiles={},
        cost=dequantize_cost,
        instructions=FROM_E2M1,
        production=cases.dequantize_production,
        modules=("nvfp4.mosaic.dequantize",),
        launch=dequantize,
        covers=lambda *arguments, offset=None, **_: offset is None,
    ),
    Kernel(
        "nvfp4_dequantize_offset",
        op="dequantize",
        chips=BLACKWELL,
        build=_build_offset,
        refusal=_any_arguments,
        run=dequantize_offset,
        oracle=dequantize_offset_oracle,
        cases=cases.offset_cases(),
        tiles={},
        cost=dequantize_offset_cost,
        instructions=FROM_E2M1,
        production=cases.offset_production,
        modules=("nvfp4.mosaic.dequantize",),
        launch=dequantize,
        device_tolerance=CHIP_ROUNDING,
        covers=lambda *arguments, offset=None, **_: offset is not None,
    ),
    _product("", (7040, 3072, 3072), (SINGLE,), pairs=False),
    _product("_2cta", (7040, 14336, 3072), (PAIRS,), pairs=True),
    _product("_low_rank", (7040, 3072, 14336), (PAIRS, r"UTCHMMA"), rank=64, pairs=True),
)
