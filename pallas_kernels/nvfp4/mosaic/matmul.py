"""Product of two NVFP4 matrices on Blackwell's block-scaled tensor cores."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.nvfp4.format import BLOCK, CODE, NVFP4, SCALE, swizzle, unit
from pallas_kernels.nvfp4.mosaic.launch import check
from pallas_kernels.nvfp4.mosaic.matmul_kernel import kernel
from pallas_kernels.nvfp4.mosaic.matmul_tiling import DEPTH, RANKS, Problem, Tiling, choose

Build = Callable[[], tuple[Callable, tuple]]
INTERPRETED_BLOCKS = 2
"""Multiprocessors of the interpreter's chip: few, so that blocks have several tiles."""
SMALLEST_UNIT = 2.0**-100
"""Products of a smaller one are left out beside a low-rank branch: dividing by it may overflow."""
_OUTPUTS = (jnp.bfloat16, jnp.float32)


def matmul(
    a: NVFP4,
    b: NVFP4,
    *,
    bias: Float[Array, "n"] | None = None,
    low_rank: tuple[Float[Array, "m r"], Float[Array, "r n"]] | None = None,
    out_dtype: Any = jnp.bfloat16,
    b_swizzled: Float[Array, "size"] | None = None,
    collective: bool | None = None,
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> Float[Array, "m n"]:
    """a [m, k] times b [n, k] transposed, plus xa [m, r] times B [r, n], plus bias; [m, n].

    Sums are float32; the unit of the product, `unit(a) * unit(b)`, multiplies them at the end, then
    the float32 bias is added. The low-rank branch goes into the same sums, so xa is divided by that
    unit and rounded to bfloat16: give it in float32, and this is its only rounding. Beside it, a
    product whose unit is under `SMALLEST_UNIT` is left out.

    Any m, n and k that 16 divides. Past the edges loads give zeros and stores write nothing, so
    nothing is padded unless 8 does not divide m, 64 not n or 256 not k: then codes are copied with
    zeros behind. `b_swizzled` is `swizzle(b.scales)`, for who keeps it; scales of `a` are swizzled
    here. `collective` uses pairs of multiprocessors; None chooses by the shape, as it does a
    `tiling`. `interpret` (`plgpu.InterpretGPUParams`) simulates a small chip, without pairs.
    Raises `Unsupported` for what the kernel cannot do.
    """
    check("matmul", interpret)
    if why := refusal(a, b, bias=bias, low_rank=low_rank, out_dtype=out_dtype):
        raise Unsupported(f"mosaic NVFP4 matmul: {why}")
    problem = _problem(a, b, bias, low_rank, out_dtype)
    if tiling is None:
        tiling = _tiling(problem, collective, interpret)
    if interpret is not None and tiling.collective:
        raise Unsupported("the interpreter knows no pairs of blocks; take collective=False")
    if b_swizzled is None:
        b_swizzled = swizzle(b.scales)
    operands = _operands(problem, a, b, b_swizzled, bias, low_rank)
    y = kernel(problem, tiling, out_dtype, interpret=interpret)(*operands)
    return y[: a.shape[0], : b.shape[0]]


def refusal(
    a: NVFP4,
    b: NVFP4,
    *,
    bias: Any = None,
    low_rank: tuple[Any, Any] | None = None,
    out_dtype: Any = jnp.bfloat16,
) -> str | None:
    """Why the kernel cannot take these arguments, whatever the chip, or None."""
    if a.ndim != 2 or b.ndim != 2 or a.lead or b.lead:
        return (
            f"it takes two matrices with one amax each, not {a.shape} with {a.lead} and {b.shape} "
            f"with {b.lead} leading axes; map over those, or flatten the rows"
        )
    (m, k), (n, other) = a.shape, b.shape
    if k != other:
        return f"rows of {k} and of {other} have no product; both are [rows, k]"
    if k % BLOCK or not (m and n and k):
        return f"k is {k}, m {m}, n {n}: k must be a positive multiple of {BLOCK}; pad with zeros"
    if jnp.dtype(out_dtype) not in _OUTPUTS:
        return f"it writes bfloat16 or float32, not {jnp.dtype(out_dtype)}; convert the result"
    if bias is not None and bias.shape != (n,):
        return f"the bias is {bias.shape}, the result has {n} columns; give one of ({n},)"
    if low_rank is None:
        return None
    left, right = low_rank
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        return f"the low-rank pair is {left.shape} and {right.shape}; give [m, r] and [r, n]"
    if (left.shape[0], right.shape[1]) != (m, n):
        return f"the low-rank product is {left.shape[0]}x{right.shape[1]}, the other {m}x{n}"
    if left.shape[1] > RANKS[-1]:
        return f"rank {left.shape[1]} is over {RANKS[-1]}; add that product outside"
    return None


def _problem(a: NVFP4, b: NVFP4, bias, low_rank, out_dtype) -> Problem:
    rank = low_rank[0].shape[1] if low_rank is not None else 0
    return Problem(
        m=_up(a.shape[0], 8),
        n=_up(b.shape[0], 64),
        k=_up(a.shape[1], DEPTH),
        rank=next(r for r in (0, *RANKS) if r >= rank),
        bias=bias is not None,
        itemsize=jnp.dtype(out_dtype).itemsize,
    )


def _tiling(problem: Problem, collective: bool | None, interpret: Any) -> Tiling:
    if interpret is not None:
        return choose(problem, multiprocessors=INTERPRETED_BLOCKS, collective=bool(collective))
    return choose(problem, multiprocessors=_multiprocessors(), collective=collective)


def _multiprocessors() -> int:
    """Of the GPU that a function traced now will run on."""
    device: Any = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return int(device.core_count)


def _operands(
    problem: Problem, a: NVFP4, b: NVFP4, b_swizzled, bias, low_rank
) -> tuple[Array, ...]:
    """What the kernel takes, padded."""
    by = unit(a) * unit(b)
    a_scales = a.scales
    if low_rank is not None:
        # The branch is divided by the unit, so one that is (nearly) zero drops the other product.
        none = by < SMALLEST_UNIT
        a_scales = jnp.where(none, jnp.zeros_like(a_scales), a_scales)
        by = jnp.where(none, jnp.float32(1), by)
    operands = [
        _padded(a.codes, (problem.m, problem.k)),
        _padded(b.codes, (problem.n, problem.k)),
        _scale_tiles(swizzle(a_scales), a.shape),
        _scale_tiles(b_swizzled, b.shape),
        by[None],
    ]
    if bias is not None:
        operands.append(_padded(bias.astype(jnp.float32), (problem.n,)))
    if low_rank is not None:
        left, right = low_rank
        left = (left.astype(jnp.float32) / by).astype(jnp.bfloat16)
        operands.append(_padded(left, (problem.m, problem.rank)))
        operands.append(_padded(right.astype(jnp.bfloat16), (problem.rank, problem.n)))
    return tuple(operands)


def _scale_tiles(swizzled: Array, shape: tuple[int, ...]) -> Array:
    """Swizzled scales as the kernel indexes them; loads give zeros past the last tile."""
    rows, k = shape
    return swizzled.reshape(_up(rows, 128) // 128, _up(k, 64) // 64, 32, 16)


def _up(size: int, to: int) -> int:
    return -(-size // to) * to


def _padded(x: Array, shape: tuple[int, ...]) -> Array:
    if x.shape == shape:
        return x
    return jnp.pad(x, [(0, want - have) for have, want in zip(x.shape, shape, strict=True)])


def product(m: int, n: int, k: int, *, rank: int = 0, **how: Any) -> Build:
    """A function that builds (callable, abstract arguments) of a product with a bias."""

    def build() -> tuple[Callable, tuple]:
        array: Any = jax.ShapeDtypeStruct

        def packed(rows: int) -> NVFP4:
            codes, scales = array((rows, k), CODE), array((rows, k // BLOCK), SCALE)
            return NVFP4(codes, scales, array((), jnp.float32), "mse")

        def run(a, b, bias, *low_rank):
            return matmul(a, b, bias=bias, low_rank=low_rank or None, **how)

        branch = (array((m, rank), jnp.float32), array((rank, n), jnp.bfloat16)) if rank else ()
        return run, (packed(m), packed(n), array((n,), jnp.float32), *branch)

    return build


SINGLE = r"UTCOMMA(?!\.2CTA)[.\w]*\.4X"
"""SASS of a product with a scale for 16 neighbours by one block, and by a pair of blocks."""
PAIRS = r"UTCOMMA\.2CTA[.\w]*\.4X"
CATALOG: Mapping[str, tuple[tuple[str, ...], Build, tuple[str, ...]]] = MappingProxyType(
    {
        "nvfp4_matmul": (("sm_100a",), product(7040, 3072, 3072, collective=False), (SINGLE,)),
        "nvfp4_matmul_2cta": (("sm_100a",), product(7040, 14336, 3072, collective=True), (PAIRS,)),
        "nvfp4_matmul_low_rank": (
            ("sm_100a",),
            product(7040, 3072, 14336, rank=64, collective=True),
            (PAIRS, r"UTCHMMA"),
        ),
    }
)
"""For checks: kernel -> chips, builder of (callable, abstract arguments), patterns of its SASS."""
