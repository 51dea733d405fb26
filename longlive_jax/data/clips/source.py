"""Training clips straight from video files: a plan, decoded, with prompts and flags."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from longlive_jax.data.clips.clip_plan import ClipPlan, JoinSpec, Part, plan
from longlive_jax.data.clips.dataset import Sample, Unusable
from longlive_jax.data.clips.decoding import frames_of, read_frames
from longlive_jax.typing import UInt8

__all__ = ["VideoClips", "lengths_of", "read_clip"]

type Row = dict[str, np.ndarray]


def lengths_of(sample: Sample) -> list[int]:
    """Its shots' lengths in frames at 24 a second. Unusable if one of them cannot be opened."""
    if sample.problem:
        raise Unusable(sample.problem)
    return [frames_of(shot) for shot in sample.shots]


def read_clip(
    sample: Sample, clip: ClipPlan, size: tuple[int, int], part: Part = slice(None)
) -> UInt8[np.ndarray, "f h w 3"]:
    """The raw frames of a clip, or only a part of them, for which only that part is decoded."""
    places = clip.frames(part)
    images = np.empty((len(places), *size, 3), np.uint8)
    for shot in sorted({shot for shot, _ in places}):
        here = [i for i, place in enumerate(places) if place[0] == shot]
        frames = [places[i][1] for i in here]
        images[here[0] : here[-1] + 1] = read_frames(sample.shots[shot], frames, size)
    return images


@dataclasses.dataclass(frozen=True)
class VideoClips:
    """A clip of every sample; see `feed.Source`.

    Attributes:
      samples: of the dataset, the usable ones.
      join: how their shots become clips.
      size: height and width in pixels.
      part: numbers of the clip's raw frames to decode, rising: what this process's devices encode
        (`training.encoding.VAEShardPlan.wanted`); None: all. Prompts, flags and mask are the whole
        clip's regardless.
      anywhere: clips begin at random places, drawn anew for every visit; else at the beginning.
    """

    samples: Sequence[Sample]
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
        """video uint8 [r, h, w, 3], mask [f], cut [k], shot [k], prompts [k] (text), dropped [].

        Raises Unusable. But damage that decoding a part of a clip reveals is seen by one process
        alone, and if that took another sample, the parts of a clip would no longer belong together.
        So then the row comes black, and `dropped` says why: the clip counts nowhere
        (`training.live`). Samples too short or with files that do not open are refused by all
        processes alike.
        """
        sample = self.samples[index]
        clip = plan(lengths_of(sample), self.join, rng if self.anywhere else None)
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
