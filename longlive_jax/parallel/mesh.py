"""The device mesh: axes data, fsdp and sp, each of size 1 or more."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

DATA, FSDP, SP = AXES = ("data", "fsdp", "sp")
BATCH = (DATA, FSDP)
"""The axes that shard the batch: every fsdp rank has its own samples and a parameter shard."""
SHARDS = (FSDP, SP)
"""The axes that shard parameters: devices that split a sequence also split the parameters."""


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Number of devices along each mesh axis.

    Attributes:
      data: number of replicas of all parameters, each with its own samples.
      fsdp: number of devices that shard both samples and parameters (within a node, for example).
      sp: number of devices that shard one sequence by frames, and parameters; the innermost axis.
    """

    data: int = 1
    fsdp: int = 1
    sp: int = 1

    def __post_init__(self) -> None:
        for name in AXES:
            if getattr(self, name) < 1:
                raise ValueError(f"mesh.{name} must be >= 1, got {getattr(self, name)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(data, fsdp, sp)."""
        return (self.data, self.fsdp, self.sp)

    @property
    def size(self) -> int:
        """Total number of devices."""
        return math.prod(self.shape)

    @property
    def samples(self) -> int:
        """Number of shards that a batch is split into: data * fsdp."""
        return self.data * self.fsdp


def make_mesh(spec: MeshSpec, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh over `devices` (default: all of them), with sp varying fastest.

    Raises ValueError if the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if spec.size != len(devices):
        raise ValueError(
            f"mesh data={spec.data} x fsdp={spec.fsdp} x sp={spec.sp} needs {spec.size} devices, "
            f"found {len(devices)}. Set mesh.data, mesh.fsdp and mesh.sp so that their product is "
            f"{len(devices)}."
        )
    grid = np.asarray(devices, object).reshape(spec.shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def check_fits(
    spec: MeshSpec, *, heads: int, chunks: int, batch: int, chunk_frames: int | None = None
) -> None:
    """Raises ValueError if the mesh does not divide the heads, the chunks or the batch size.

    `chunk_frames` are the latent frames of a chunk where chunks are split as well.
    """
    _check_splits("attention heads", heads, "mesh.sp", spec.sp)
    _check_splits("chunks of a sequence", chunks, "mesh.sp", spec.sp)
    check_batch_splits(batch, spec.samples)
    if chunk_frames is not None:
        _check_splits("latent frames of a chunk", chunk_frames, "mesh.sp", spec.sp)


def check_batch_splits(batch: int, num_shards: int) -> None:
    """Raises ValueError if a batch does not split over data * fsdp = `num_shards`."""
    _check_splits("samples in a batch", batch, "mesh.data * mesh.fsdp", num_shards)


def _check_splits(items: str, count: int, axis: str, num_shards: int) -> None:
    if count % num_shards:
        raise ValueError(
            f"{count} {items} do not split over {axis} = {num_shards}; choose a divisor: "
            f"{', '.join(str(n) for n in range(1, count + 1) if count % n == 0)}"
        )
