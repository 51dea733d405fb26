"""The mesh: axes data, fsdp and sp, any of them 1."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

DATA, FSDP, SP = AXES = ("data", "fsdp", "sp")
BATCH = (DATA, FSDP)
"""Samples are shared out over both: an fsdp rank holds parameters and has samples of its own."""
SHARDS = (FSDP, SP)
"""Parameters are shared out over both: whoever splits a sequence can hold a part of them too."""


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Devices along each axis.

    Attributes:
      data: copies of all parameters, each with samples of its own.
      fsdp: devices that share samples and parameters out among them (within a node, say).
      sp: devices that share one sequence out by frames, and parameters as well; the innermost axis.
    """

    data: int = 1
    fsdp: int = 1
    sp: int = 1

    def __post_init__(self) -> None:
        for name in AXES:
            if getattr(self, name) < 1:
                raise ValueError(f"mesh.{name} is {getattr(self, name)}; give at least 1")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(data, fsdp, sp)."""
        return (self.data, self.fsdp, self.sp)

    @property
    def size(self) -> int:
        """Devices in all."""
        return math.prod(self.shape)

    @property
    def samples(self) -> int:
        """Ways in which a batch is split."""
        return self.data * self.fsdp


def make_mesh(spec: MeshSpec, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), sp fastest.

    Raises ValueError if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if spec.size != len(devices):
        raise ValueError(
            f"mesh data={spec.data}, fsdp={spec.fsdp}, sp={spec.sp} needs {spec.size} devices and "
            f"there are {len(devices)}; change one axis so that the product is {len(devices)}"
        )
    grid = np.asarray(devices, object).reshape(spec.shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def check_fits(spec: MeshSpec, *, heads: int, chunks: int, batch: int) -> None:
    """ValueError if heads, the chunks of a sequence or the samples of a batch do not divide."""
    for what, count, axis, parts in (
        ("attention heads", heads, "mesh.sp", spec.sp),
        ("chunks of a sequence", chunks, "mesh.sp", spec.sp),
        ("samples in a batch", batch, "mesh.data * mesh.fsdp", spec.samples),
    ):
        if count % parts:
            raise ValueError(
                f"{count} {what} do not split over {axis} = {parts}; choose a divisor: "
                f"{', '.join(str(n) for n in range(1, count + 1) if count % n == 0)}"
            )
