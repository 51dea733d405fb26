"""Stage `base`: trains the small world's bidirectional DiT, which stage `ar` can start from."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from longlive_jax.small_world.clips import ClipBatches, ClipSpec
from longlive_jax.small_world.stage_dit import DiTStage
from longlive_jax.small_world.windows import EncodedVideos


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseStage(DiTStage):
    """Stage `base`: trains the DiT by flow matching on clips whose chunks all see each other.

    It differs from stage `ar` in its data alone: clips in place of windows.

    Attributes:
      windows: clips cut from the videos.
    """

    name: ClassVar[str] = "base"
    """Name of the stage in a config."""

    windows: ClipSpec = dataclasses.field(default_factory=ClipSpec)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if (devices := self.mesh.samples * self.mesh.sp) != 1:
            raise ValueError(f"mesh must be of 1 device in this stage, got {devices}")
        if self.recycling is not None:
            raise ValueError("recycling needs context, which clips do not have; leave it out")
        if self.loss.image_to_video:
            raise ValueError("loss.image_to_video must be False in this stage")

    def batches(self, videos: EncodedVideos, steps: int, seed: int) -> Sequence:
        """Batches of clips of the videos, by step."""
        return ClipBatches(videos, self.windows, steps, seed)
