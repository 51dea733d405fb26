"""The product of two NVFP4 matrices on Blackwell's block-scaled tensor cores."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.nvfp4.format import BLOCK, NVFP4, global_scale, with_scale_layout
from pallas_kernels.nvfp4.mosaic.launch import check_device
from pallas_kernels.nvfp4.mosaic.matmul_kernel import kernel
from pallas_kernels.nvfp4.mosaic.matmul_tiling import RANKS, TILE_DEPTH, Problem, Tiling, choose

INTERPRETED_BLOCKS = 2
"""Multiprocessors of the interpreted chip: few, so that thread blocks have several tiles."""
SMALLEST_SCALE = 2.0**-100
"""Smallest per-tensor scale with a low-rank branch. Dividing the branch by a smaller one may
overflow, so the quantized product is dropped instead."""
_OUTPUTS = (jnp.bfloat16, jnp.float32)


def matmul(
    a: NVFP4,
    b: NVFP4,
    *,
    bias: Float[Array, "n"] | None = None,
    low_rank: tuple[Float[Array, "m r"], Float[Array, "r n"]] | None = None,
    out_dtype: Any = jnp.bfloat16,
    collective: bool | None = None,
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> Float[Array, "m n"]:
    """Computes a @ b^T + xa @ B + bias, of shape [m, n].

    Sums are float32, multiplied by `global_scale(a) * global_scale(b)` at the end. The low-rank
    branch accumulates into the same sums, so xa is divided by that scale and rounded to bfloat16;
    given in float32, this is its only rounding. With a branch, a product whose scale is below
    `SMALLEST_SCALE` is dropped. Codes are copied to pad them only if m is not a multiple of 8, n of
    64 or k of 64. Operands in scale layout "tiles" are read as they are; others are reordered.

    Args:
      a, b: matrices [m, k] and [n, k]; k must be a multiple of 16.
      bias: float32 [n], added at the end; or None.
      low_rank: pair (xa [m, r], B [r, n]), or None.
      out_dtype: bfloat16 or float32.
      collective: use pairs of multiprocessors; None chooses by the shape.
      tiling: tile sizes; None chooses by the shape.
      interpret: `plgpu.InterpretGPUParams` to interpret a small chip, without pairs.

    Raises `Unsupported` for arguments that the kernel does not support.
    """
    check_device("matmul", interpret)
    if why := refusal(a, b, bias=bias, low_rank=low_rank, out_dtype=out_dtype):
        raise Unsupported(f"mosaic NVFP4 matmul: {why}")
    problem = _problem(a, b, bias, low_rank, out_dtype)
    if tiling is None:
        tiling = _tiling(problem, collective, interpret)
    if interpret is not None and tiling.collective:
        raise Unsupported("the interpreter does not support pairs of blocks; set collective=False")
    operands = kernel_operands(problem, a, b, bias, low_rank)
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
    """The reason why the kernel does not support these arguments on any chip, or None."""
    if a.ndim != 2 or b.ndim != 2 or a.lead or b.lead:
        return (
            f"operands must be matrices with one amax each, got {a.shape} with {a.lead} and "
            f"{b.shape} with {b.lead} leading axes; map over them, or flatten the rows"
        )
    (m, k), (n, other) = a.shape, b.shape
    if k != other:
        return f"the contraction axes differ: a has {k} columns, b has {other}"
    if k % BLOCK or not (m and n and k):
        return f"k must be a positive multiple of {BLOCK}, got m={m}, n={n}, k={k}; pad with zeros"
    if jnp.dtype(out_dtype) not in _OUTPUTS:
        return f"out_dtype must be bfloat16 or float32, got {jnp.dtype(out_dtype)}; cast the result"
    if bias is not None and bias.shape != (n,):
        return f"the bias must have shape ({n},), got {bias.shape}"
    if low_rank is None:
        return None
    left, right = low_rank
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        return f"the low-rank pair must be [m, r] and [r, n], got {left.shape} and {right.shape}"
    if (left.shape[0], right.shape[1]) != (m, n):
        return f"the low-rank product must be {m}x{n}, got {left.shape[0]}x{right.shape[1]}"
    if left.shape[1] > RANKS[-1]:
        return f"the rank must be <= {RANKS[-1]}, got {left.shape[1]}; add that product outside"
    return None


def _problem(a: NVFP4, b: NVFP4, bias, low_rank, out_dtype) -> Problem:
    rank = low_rank[0].shape[1] if low_rank is not None else 0
    return Problem(
        m=_up(a.shape[0], 8),
        n=_up(b.shape[0], 64),
        k=_up(a.shape[1], TILE_DEPTH),
        rank=next(r for r in (0, *RANKS) if r >= rank),
        bias=bias is not None,
        itemsize=jnp.dtype(out_dtype).itemsize,
    )


def _tiling(problem: Problem, collective: bool | None, interpret: Any) -> Tiling:
    if interpret is not None:
        return choose(problem, multiprocessors=INTERPRETED_BLOCKS, collective=bool(collective))
    return choose(problem, multiprocessors=_multiprocessors(), collective=collective)


def _multiprocessors() -> int:
    """The number of multiprocessors of the GPU that a function traced now will run on."""
    device: Any = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return int(device.core_count)


def kernel_operands(problem: Problem, a: NVFP4, b: NVFP4, bias, low_rank) -> tuple[Array, ...]:
    """The kernel's operands, padded: codes, scale tiles, scale, and the optional ones."""
    scale = global_scale(a) * global_scale(b)
    a_scales, b_scales = (with_scale_layout(c, "tiles").scales for c in (a, b))
    if low_rank is not None:
        # The branch is divided by the scale, so a scale near zero drops the quantized product.
        too_small = scale < SMALLEST_SCALE
        a_scales = jnp.where(too_small, jnp.zeros_like(a_scales), a_scales)
        scale = jnp.where(too_small, jnp.float32(1), scale)
    operands = [
        _padded(a.codes, (problem.m, problem.k)),
        _padded(b.codes, (problem.n, problem.k)),
        a_scales,
        b_scales,
        scale[None],
    ]
    if bias is not None:
        operands.append(_padded(bias.astype(jnp.float32), (problem.n,)))
    if low_rank is not None:
        left, right = low_rank
        left = (left.astype(jnp.float32) / scale).astype(jnp.bfloat16)
        operands.append(_padded(left, (problem.m, problem.rank)))
        operands.append(_padded(right.astype(jnp.bfloat16), (problem.rank, problem.n)))
    return tuple(operands)


def _up(size: int, to: int) -> int:
    """`size` rounded up to a multiple of `to`."""
    return -(-size // to) * to


def _padded(x: Array, shape: tuple[int, ...]) -> Array:
    if x.shape == shape:
        return x
    return jnp.pad(x, [(0, want - have) for have, want in zip(x.shape, shape, strict=True)])
