"""Random runs of frames from the videos of a dataset, for training a VAE."""

import dataclasses
from pathlib import Path

import numpy as np

from longlive_jax.data.clips.dataset import Unusable, find_samples, usable
from longlive_jax.data.clips.decoding import read_frames, shot_length
from longlive_jax.io.pictures import to_pixels
from longlive_jax.spec import UserError
from longlive_jax.typing import Float, UInt8

__all__ = ["FrameRuns"]

MAX_BYTES = 4 * 2**30
"""Limit on the memory of all frames."""


@dataclasses.dataclass(frozen=True)
class FrameRuns:
    """All frames of a dataset's shots, in memory, from which runs are drawn.

    Attributes:
      shots: frames of every shot, at one size.
      where: the dataset, for messages.
    """

    shots: tuple[UInt8[np.ndarray, "n h w 3"], ...]
    where: str

    @classmethod
    def read(cls, where: str | Path, size: tuple[int, int]) -> "FrameRuns":
        """Decodes every video at `size` (height, width).

        Raises UserError for a folder that is not a dataset, or too large for memory, or if a video
        cannot be read.
        """
        samples = usable(find_samples(where), where)
        shots = [shot for sample in samples for shot in sample.shots]
        try:
            lengths = [shot_length(shot) for shot in shots]
            needed = 3 * size[0] * size[1] * sum(lengths)
            if needed > MAX_BYTES:
                raise UserError(
                    f"{where}: its frames must take <= {MAX_BYTES / 2**30:g} GiB at "
                    f"{size[0]}x{size[1]} pixels, got {needed / 2**30:.1f}; use fewer videos"
                )
            pairs = zip(shots, lengths, strict=True)
            frames = tuple(read_frames(shot, list(range(length)), size) for shot, length in pairs)
        except Unusable as reason:
            raise UserError(f"{where}: {reason}; see `longlive data check {where}`") from reason
        return cls(frames, str(where))

    def check_length(self, frames: int) -> None:
        """Raises UserError if no shot has so many frames."""
        longest = max(map(len, self.shots))
        if longest < frames:
            raise UserError(
                f"{self.where}: a shot must have >= {frames} frames at 24 fps, the longest has "
                f"{longest}; use longer clips or fewer frames in config.phases"
            )

    def draw(
        self, rng: np.random.Generator, batch: int, frames: int
    ) -> Float[np.ndarray, "b f h w 3"]:
        """Runs of consecutive frames at random places, in [-1, 1]."""
        shots = [shot for shot in self.shots if len(shot) >= frames]
        chosen = [shots[i] for i in rng.integers(len(shots), size=batch)]
        starts = [int(rng.integers(len(shot) - frames + 1)) for shot in chosen]
        runs = [shot[at : at + frames] for shot, at in zip(chosen, starts, strict=True)]
        return to_pixels(np.stack(runs))
