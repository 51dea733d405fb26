"""Which raw frames a device must encode to get its own latents right without asking its neighbours.

The paper's way (section 2.1): its own frames, and before them a halo as long as the encoder looks
back, whose latents are dropped. `tails` does without; this says what that saves.
"""

import dataclasses

HALO = 28
"""Latents. The encoder of Wan 2.2 looks back 27; the reference takes one more."""


@dataclasses.dataclass(frozen=True)
class Window:
    """Raw frames [first, last) of a clip, whose first `dropped` latents are not wanted."""

    first: int
    last: int
    dropped: int

    @property
    def frames(self) -> int:
        """Raw frames to encode."""
        return self.last - self.first


def window(keep: tuple[int, int], *, halo: int = HALO, temporal_stride: int = 4) -> Window:
    """For latents [keep[0], keep[1]) of a clip whose VAE makes `temporal_stride` frames one latent.

    The window begins with the last frame of the latent before the halo: the encoder takes it for
    the single frame of a first latent, and after it the groups of frames fall as they should.
    """
    start, end = keep
    first = max(0, start - halo)
    last = 1 + temporal_stride * (end - 1)
    if first == 0:
        return Window(0, last, start)
    return Window(temporal_stride * (first - 1), last, 1 + start - first)


def windows(
    latents: int, parts: int, *, halo: int = HALO, temporal_stride: int = 4
) -> tuple[Window, ...]:
    """The window of every device. Raises ValueError if latents do not split into equal parts."""
    if latents % parts:
        raise ValueError(f"{latents} latents do not split over mesh.sp = {parts}; choose a divisor")
    own = latents // parts
    return tuple(
        window((p * own, (p + 1) * own), halo=halo, temporal_stride=temporal_stride)
        for p in range(parts)
    )


def equal_windows(
    latents: int, parts: int, *, halo: int = HALO, temporal_stride: int = 4
) -> tuple[Window, ...]:
    """As `windows`, but all as long as the longest, for devices that run in step.

    Near either end of the clip a window reaches further than it must: right of what is kept at the
    start, left of the halo at the end. `dropped` counts the latents before those kept. It takes no
    device longer than the busiest one of `windows`. Raises ValueError as that does.
    """
    own = latents // parts
    longest = min(latents, 1 + halo + own)
    found = []
    for part in range(len(windows(latents, parts, halo=halo, temporal_stride=temporal_stride))):
        first = min(max(0, part * own - halo - 1), latents - longest)
        last = 1 + temporal_stride * (first + longest - 1)
        found.append(Window(temporal_stride * first, last, part * own - first))
    return tuple(found)
