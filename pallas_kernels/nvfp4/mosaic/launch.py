"""What the quantize and dequantize kernels are launched by: where they run, and who does what."""

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
from pallas_kernels.nvfp4.mosaic.blocks import E2M1, E4M3, GROUP, Form


def refusal(op: str) -> str | None:
    """Why `op` ("quantize") has no Mosaic kernel on the device at hand, or None."""
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


def check(op: str, interpret: Any) -> None:
    """Raises `Unsupported` where the kernel could neither run nor be simulated."""
    if interpret is None and (why := refusal(op)) is not None:
        raise Unsupported(why)


@dataclasses.dataclass(frozen=True)
class Cut:
    """`length` things in groups of `width`, of which every program takes `per`.

    The last program also takes what is left over. Where `length` is no whole number of groups the
    last one begins earlier and does some things once more; the same program does both, so nobody
    writes while somebody else does.
    """

    length: int
    per: int
    width: int = GROUP

    def __post_init__(self) -> None:
        if self.length < self.width:
            raise ValueError(f"{self.length} are fewer than a group of {self.width}")

    @property
    def groups(self) -> int:
        return -(-self.length // self.width)

    @property
    def programs(self) -> int:
        return max(1, self.length // (self.width * self.per))

    def walk(self, program: Any, step: Callable[[Any], None]) -> None:
        """Calls `step` with the first thing of each group of a program, inside a kernel."""
        first = program * self.per
        stop = lax.select(program == self.programs - 1, jnp.int32(self.groups), first + self.per)

        @pl.loop(first, stop)
        def _group(group):
            step(lax.min(group * self.width, jnp.int32(self.length - self.width)))


@dataclasses.dataclass(frozen=True)
class Task:
    """What a program quantizes by: the form, `amax` of its entry of the leading axis, the two words
    of random numbers, and the number of the entry."""

    form: Form
    amax: Any
    words: Any
    entry: Any


def outputs(blocks: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Codes and scales of so many blocks."""
    codes = jax.ShapeDtypeStruct((*blocks, BLOCK), E2M1)
    return codes, jax.ShapeDtypeStruct(blocks, E4M3)


def at_least(x: Array, axis: int, size: int) -> Array:
    """x with zeros behind it on an axis, up to `size`."""
    edges = [(0, 0)] * x.ndim
    edges[axis] = (0, max(0, size - x.shape[axis]))
    return jnp.pad(x, edges) if edges[axis][1] else x


def kernel(body: Callable, out: Any, grid: dict[str, int], *, warpgroups: int = 1, interpret=None):
    """`body` over a grid with named axes; beyond one, warpgroups are the axis "warpgroup"."""
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
