"""Bytes that one linear moves on a GB200, by implementation, and what a run says about them.

They are counted in compiled programs (`longlive bench nvfp4 --bytes`), not measured: 7040 tokens,
3072 inputs and 3072 outputs.
"""

from collections.abc import Mapping
from types import MappingProxyType

from pallas_kernels.dispatch import Implementation

__all__ = ["COUNTED", "traffic_note"]

COUNTED: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "bf16": {"inference": 192, "training": 522},
        "xla": {"inference": 484, "training": 2688},
        "mosaic": {"inference": 159, "training": 412},
    }
)
"""Implementation -> phase -> MB (10^6 bytes) of a linear; training is forward and backward."""


def traffic_note(implementation: Implementation, *, trains: bool) -> str:
    """Says so where NVFP4 moves more bytes than bf16 on a Blackwell GPU; else nothing."""
    if implementation not in COUNTED:
        return ""
    kind = "training" if trains else "inference"
    own, bf16 = COUNTED[implementation][kind], COUNTED["bf16"][kind]
    if own <= bf16:
        return ""
    return (
        f"; this saves memory, not time: a linear of 7040x3072x3072 moves {own} MB, in bf16 "
        f"{bf16} MB (counted for a GB200)"
    )
