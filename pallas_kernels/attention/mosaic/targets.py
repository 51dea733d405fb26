"""The attention kernels of each chip."""

import dataclasses
from collections.abc import Callable
from typing import Any

from pallas_kernels.attention.mosaic import (
    blackwell_backward,
    blackwell_forward,
    blackwell_key_value_gradient,
    blackwell_query_gradient,
    hopper_backward,
    hopper_forward,
)


@dataclasses.dataclass(frozen=True)
class Target:
    """The kernels of one chip and the tile sizes they were tested with.

    Attributes:
      name: name of the architecture.
      forward: forward kernel, with the signature of `hopper_forward.forward`.
      query_gradient: dq kernel, with the signature of `hopper_backward.query_gradient`.
      key_value_gradient: dk and dv kernel, with the signature of
        `hopper_backward.key_value_gradient`.
      forward_tiles: tile sizes of the forward kernel.
      backward_tiles: tile sizes of the backward kernels.
    """

    name: str
    forward: Callable
    query_gradient: Callable
    key_value_gradient: Callable
    forward_tiles: Any
    backward_tiles: Any

    @property
    def rows(self) -> int:
        """Lengths are padded to a multiple of this, which the tiles of every kernel divide."""
        return max(self.forward_tiles.rows, self.forward_tiles.keys, self.backward_tiles.rows)


HOPPER = Target(
    "Hopper",
    hopper_forward.forward,
    hopper_backward.query_gradient,
    hopper_backward.key_value_gradient,
    hopper_forward.ForwardTiles(),
    hopper_backward.BackwardTiles(),
)
BLACKWELL = Target(
    "Blackwell",
    blackwell_forward.forward,
    blackwell_query_gradient.query_gradient,
    blackwell_key_value_gradient.key_value_gradient,
    blackwell_forward.ForwardTiles(),
    blackwell_backward.BackwardTiles(),
)
