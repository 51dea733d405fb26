"""The kernels of each chip, by compute capability."""

import dataclasses
from collections.abc import Callable
from typing import Any

from pallas_kernels.attention.mosaic import (
    blackwell_backward,
    blackwell_forward,
    hopper_backward,
    hopper_forward,
)


@dataclasses.dataclass(frozen=True)
class Target:
    """One chip's kernels and the tiles they were checked with.

    `forward`, `query_gradient` and `key_value_gradient` are called as those of `hopper_forward` and
    `hopper_backward`. Lengths are padded to `rows`, which tiles of every kernel divide.
    """

    name: str
    capability: str
    forward: Callable
    query_gradient: Callable
    key_value_gradient: Callable
    forward_tiles: Any
    backward_tiles: Any

    @property
    def rows(self) -> int:
        """Whole tiles of every kernel."""
        return max(self.forward_tiles.rows, self.forward_tiles.keys, self.backward_tiles.rows)


HOPPER = Target(
    "Hopper",
    "9.0",
    hopper_forward.forward,
    hopper_backward.query_gradient,
    hopper_backward.key_value_gradient,
    hopper_forward.ForwardTiles(),
    hopper_backward.BackwardTiles(),
)
BLACKWELL = Target(
    "Blackwell",
    "10.0",
    blackwell_forward.forward,
    blackwell_backward.query_gradient,
    blackwell_backward.key_value_gradient,
    blackwell_forward.ForwardTiles(),
    blackwell_backward.BackwardTiles(),
)
TARGETS = {target.capability: target for target in (HOPPER, BLACKWELL)}
