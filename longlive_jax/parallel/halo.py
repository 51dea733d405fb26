"""Halo windows: the raw frames that let a device encode its own latents without communication.

This is the paper's method (section 2.1): a device encodes its own frames and, before them, a halo
as long as the encoder's temporal receptive field, then drops the halo's latents. `tails` avoids the
halo by exchanging layer inputs instead.
"""

import dataclasses

HALO = 28
"""Halo length in latents. The encoder of Wan 2.2 looks back 27; the reference takes one more."""


@dataclasses.dataclass(frozen=True)
class Window:
    """A contiguous range of a clip's raw frames for one device to encode.

    Attributes:
      first: index of the first raw frame.
      last: index one past the last raw frame.
      dropped: number of leading latents to discard after encoding.
    """

    first: int
    last: int
    dropped: int

    @property
    def frames(self) -> int:
        """Number of raw frames to encode."""
        return self.last - self.first


def window(keep: tuple[int, int], *, halo: int = HALO, temporal_stride: int = 4) -> Window:
    """The window that yields latents [keep[0], keep[1]) of a clip.

    The VAE turns `temporal_stride` raw frames into one latent. The window begins with the last
    frame of the latent before the halo: the encoder treats it as the single frame of a first
    latent, so all later groups of frames line up with those of the full clip.
    """
    start, end = keep
    first = max(0, start - halo)
    last = 1 + temporal_stride * (end - 1)
    if first == 0:
        return Window(0, last, start)
    return Window(temporal_stride * (first - 1), last, 1 + start - first)


def halo_windows(
    latents: int, num_shards: int, *, halo: int = HALO, temporal_stride: int = 4
) -> tuple[Window, ...]:
    """The window of each device.

    Raises ValueError if `num_shards` does not divide `latents`.
    """
    if latents % num_shards:
        raise ValueError(
            f"{latents} latents do not split over mesh.sp = {num_shards}; choose a divisor"
        )
    own = latents // num_shards
    return tuple(
        window((p * own, (p + 1) * own), halo=halo, temporal_stride=temporal_stride)
        for p in range(num_shards)
    )


def equal_windows(
    latents: int, num_shards: int, *, halo: int = HALO, temporal_stride: int = 4
) -> tuple[Window, ...]:
    """The windows of `halo_windows`, all extended to the longest length, for SPMD execution.

    Near either end of the clip a window covers more frames than it needs: extra frames on the right
    at the start of the clip, and on the left at its end. `dropped` counts the latents before those
    that are kept. No device takes longer than the busiest one of `halo_windows`. Raises ValueError
    if `num_shards` does not divide `latents`.
    """
    own = latents // num_shards
    longest = min(latents, 1 + halo + own)
    padded = []
    exact = halo_windows(latents, num_shards, halo=halo, temporal_stride=temporal_stride)
    for shard in range(len(exact)):
        first = min(max(0, shard * own - halo - 1), latents - longest)
        last = 1 + temporal_stride * (first + longest - 1)
        padded.append(Window(temporal_stride * first, last, shard * own - first))
    return tuple(padded)
