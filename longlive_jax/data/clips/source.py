"""Training clips read directly from video files, with their prompts and flags."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from longlive_jax.data.clips.clip_plan import ClipPlan, FrameSelection, JoinSpec, plan_clip
from longlive_jax.data.clips.dataset import Unusable, VideoSample
from longlive_jax.data.clips.decoding import read_frames, shot_length
from longlive_jax.typing import UInt8

__all__ = ["VideoClips", "read_clip", "shot_lengths"]

type Row = dict[str, np.ndarray]


def shot_lengths(sample: VideoSample) -> list[int]:
    """Lengths of a sample's shots in frames at 24 fps. Raises Unusable if one cannot be opened."""
    if sample.problem:
        raise Unusable(sample.problem)
    return [shot_length(shot) for shot in sample.shots]


def read_clip(
    sample: VideoSample, clip: ClipPlan, size: tuple[int, int], part: FrameSelection = slice(None)
) -> UInt8[np.ndarray, "f h w 3"]:
    """Reads the raw frames of a clip at `size` (height, width).

    If `part` selects some of them, only these are decoded. Raises Unusable.
    """
    positions = clip.frames(part)
    images = np.empty((len(positions), *size, 3), np.uint8)
    for shot in sorted({shot for shot, _ in positions}):
        rows = [i for i, position in enumerate(positions) if position[0] == shot]
        frames = [positions[i][1] for i in rows]
        images[rows[0] : rows[-1] + 1] = read_frames(sample.shots[shot], frames, size)
    return images


@dataclasses.dataclass(frozen=True)
class VideoClips:
    """One clip per sample, decoded on every read; a `loader.ClipSource`.

    Attributes:
      samples: the usable samples of a dataset.
      join: joining rules for their shots.
      size: (height, width) in pixels.
      part: indices of the raw frames to decode, ascending: those that this process's devices encode
        (`models.vae.sharded.VAEShardPlan.frame_indices`); None for all. Prompts, flags and mask
        always cover the full clip.
      anywhere: whether clips begin at random positions, drawn again on every read, rather than at
        the beginning of the sample.
    """

    samples: Sequence[VideoSample]
    join: JoinSpec
    size: tuple[int, int]
    part: Sequence[int] | None = None
    anywhere: bool = True

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """The sample's name, for messages."""
        return self.samples[index].name

    def read(self, index: int, rng: np.random.Generator) -> Row:
        """Reads one clip.

        Raises Unusable for samples that are too short or whose files do not open, which every
        process detects alike. Damage that only decoding reveals may be visible to one process of a
        sequence-parallel group alone: if that process took another sample, the shards of the clip
        would no longer match. So with `part`, such a clip has a black video and a reason in
        `dropped`, and the training loss ignores it (`training.stages.online_encoding`).

        Returns:
          video: raw frames, uint8 [r, h, w, 3].
          mask: 1 for real latents, 0 for padding, [f].
          cut: chunks that begin a shot, [k].
          shot: number of cuts up to each chunk, [k].
          prompts: each chunk's prompt, strings [k].
          dropped: why the video is black; empty if it is not.
        """
        sample = self.samples[index]
        clip = plan_clip(shot_lengths(sample), self.join, rng if self.anywhere else None)
        dropped = ""
        try:
            video = read_clip(
                sample, clip, self.size, slice(None) if self.part is None else self.part
            )
        except Unusable as reason:
            if self.part is None:
                raise
            video = np.zeros((len(self.part), *self.size, 3), np.uint8)
            dropped = f"{sample.name}: {reason}"
        prompts = clip.prompts([shot.caption for shot in sample.shots])
        return {
            "video": video,
            "mask": clip.mask,
            "cut": clip.cut,
            "shot": clip.shot,
            "prompts": np.array(prompts),
            "dropped": np.array(dropped),
        }
