"""Launching the quantize and dequantize kernels: device checks, work partition, grid."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.dispatch import Unsupported, capability, platform
from pallas_kernels.nvfp4.format import BLOCK
from pallas_kernels.nvfp4.mosaic.blocks import E2M1, E4M3, GROUP, QuantizeOptions


def refusal(op: str) -> str | None:
    """The reason why `op` ("quantize") has no Mosaic kernel on the current device, or None."""
    if platform() != "gpu":
        return f"the NVFP4 {op} kernel needs an NVIDIA GPU; this is {platform()}: use 'xla'"
    here = capability()
    if not here.startswith("10."):
        chip = f"sm_{here.replace('.', '')}" if here else "an unknown GPU"
        return (
            f"NVFP4 {op} needs Blackwell (sm_100), whose hardware converts 4-bit floats; this is "
            f"{chip}: use quant=fp8 or implementation='xla'"
        )
    return None


def check_device(op: str, interpret: Any) -> None:
    """Raises `Unsupported` if the kernel can neither run nor be interpreted."""
    if interpret is None and (why := refusal(op)) is not None:
        raise Unsupported(why)


@dataclasses.dataclass(frozen=True)
class WorkPartition:
    """Partition of `length` items into groups of `width`, with `per` groups per program.

    The last program also takes the remaining groups. If `length` is not a multiple of `width`, the
    last group starts earlier and repeats some items; the same program processes both groups, so no
    two programs write the same item.

    Attributes:
      length: number of items.
      per: groups per program.
      width: items per group.
    """

    length: int
    per: int
    width: int = GROUP

    def __post_init__(self) -> None:
        if self.length < self.width:
            raise ValueError(f"length must be >= {self.width}, the group size, got {self.length}")

    @property
    def groups(self) -> int:
        return -(-self.length // self.width)

    @property
    def programs(self) -> int:
        return max(1, self.length // (self.width * self.per))

    def walk(self, program: Any, step: Callable[[Any], None]) -> None:
        """Calls `step` with the first item of each group of a program, inside a kernel."""
        first = program * self.per
        stop = lax.select(program == self.programs - 1, jnp.int32(self.groups), first + self.per)

        @pl.loop(first, stop)
        def _group(group):
            step(lax.min(group * self.width, jnp.int32(self.length - self.width)))


@dataclasses.dataclass(frozen=True)
class ProgramArgs:
    """Arguments of one program of a quantize kernel.

    Attributes:
      options: how the output is quantized.
      amax: largest magnitude of the program's entry of the leading axis.
      words: two seed words of the rounding noise.
      entry: index of the entry.
    """

    options: QuantizeOptions
    amax: Any
    words: Any
    entry: Any


def outputs(blocks: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes of the codes and scales of an array of blocks."""
    codes = jax.ShapeDtypeStruct((*blocks, BLOCK), E2M1)
    return codes, jax.ShapeDtypeStruct(blocks, E4M3)


def pad_to(x: Array, axis: int, size: int) -> Array:
    """Pads `axis` of x with zeros at the end, up to `size`."""
    edges = [(0, 0)] * x.ndim
    edges[axis] = (0, max(0, size - x.shape[axis]))
    return jnp.pad(x, edges) if edges[axis][1] else x


def kernel(body: Callable, out: Any, grid: dict[str, int], *, warpgroups: int = 1, interpret=None):
    """Builds a kernel over a grid with named axes.

    With more than one warpgroup per program, their axis is "warpgroup".
    """
    threads: dict[str, Any] = (
        {} if warpgroups == 1 else {"num_threads": warpgroups, "thread_name": "warpgroup"}
    )
    return plgpu.kernel(
        body,
        out_type=out,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **threads,
        **({} if interpret is None else {"interpret": interpret}),
    )
