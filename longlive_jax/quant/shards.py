"""PartitionSpecs of packed matrices, from those of the arrays `[layers, i, o]` they replace."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from pallas_kernels.nvfp4 import BLOCK, NVFP4, Rule, ScaleLayout

__all__ = ["TILE", "check_blocks", "matrix_axes", "nvfp4_spec", "splits_into_tiles", "transposed"]

TILE = 128
"""Shards of this many rows and columns split into scale tiles of a matrix and of its transpose."""


def transposed(spec: P, path: str) -> P:
    """The spec of `[layers, o, i]` from that of `[layers, i, o]`; layers must not be sharded."""
    layers, inputs, outputs = (*spec, None, None, None)[:3]
    if layers is not None:
        raise ValueError(
            f"{path}: layers are sharded over {layers}; quantized layers must be replicated"
        )
    return P(None, outputs, inputs)


def nvfp4_spec(spec: P, rule: Rule, layout: ScaleLayout) -> Any:
    """The specs of an NVFP4 array whose codes have `spec`."""
    scales = P(*spec, None, None) if layout == "tiles" else spec
    return NVFP4(spec, scales, P(), rule, layout)  # type: ignore[arg-type]


def matrix_axes(spec: P, ndim: int) -> tuple[Any, Any]:
    """The mesh axes of the last two of `ndim` axes."""
    inputs, outputs = (*spec, *(None,) * ndim)[ndim - 2 : ndim]
    return inputs, outputs


def splits_into_tiles(shape: tuple[int, ...], spec: P, sizes: Mapping[str, int]) -> bool:
    """Whether the shards of a matrix split into scale tiles; `sizes` are those of the mesh axes."""
    axes = matrix_axes(spec, len(shape))
    return not any(
        size % (TILE * _num_shards(sizes, names))
        for size, names in zip(shape[-2:], axes, strict=True)
    )


def check_blocks(path: str, shape: tuple[int, ...], spec: P, sizes: Mapping[str, int]) -> None:
    """Raises ValueError if the shards of the matrix at `path` do not split into blocks."""
    for size, names in zip(shape, spec, strict=False):
        shards = _num_shards(sizes, names)
        if shards > 1 and size % (BLOCK * shards):
            raise ValueError(
                f"{path} {shape}: {size} over {shards} devices must be a multiple of {BLOCK} each; "
                f"choose fewer devices along {names}, or quant.policy none"
            )


def _num_shards(sizes: Mapping[str, int], names: Any) -> int:
    shards = 1
    for name in (names,) if isinstance(names, str) else names or ():
        shards *= sizes[name]
    return shards
