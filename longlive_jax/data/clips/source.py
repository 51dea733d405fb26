"""Training clips straight from video files: a plan, decoded, with prompts and flags."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from longlive_jax.data.clips.dataset import Sample, Unusable
from longlive_jax.data.clips.decoding import frames_of, read_frames
from longlive_jax.data.clips.plan import ClipPlan, JoinSpec, plan
from longlive_jax.typing import UInt8

__all__ = ["VideoClips", "lengths_of", "read_clip"]

type Row = dict[str, np.ndarray]


def lengths_of(sample: Sample) -> list[int]:
    """Its shots' lengths in frames at 24 a second. Unusable if one of them cannot be opened."""
    if sample.problem:
        raise Unusable(sample.problem)
    return [frames_of(shot) for shot in sample.shots]


def read_clip(
    sample: Sample, clip: ClipPlan, size: tuple[int, int], part: slice = slice(None)
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
      part: raw frames of the clip to decode: what this rank's share of the latents needs
        (`plan.raw_frames`, or a window of `parallel.halo`). Prompts, flags and mask are the whole
        clip's regardless.
      anywhere: clips begin at random places, drawn anew for every visit; else at the beginning.
    """

    samples: Sequence[Sample]
    join: JoinSpec
    size: tuple[int, int]
    part: slice | None = None
    anywhere: bool = True

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """The sample's name, for messages."""
        return self.samples[index].name

    def read(self, index: int, rng: np.random.Generator) -> Row:
        """video uint8 [r, h, w, 3], mask [f], cut [k], shot [k], prompts [k] (text), usable [].

        Raises Unusable. But damage that decoding a part of a clip reveals is seen by one rank
        alone, and if that rank took another sample, the parts of a clip would no longer belong
        together. So then the row comes with `usable` false, black, and with nothing in its mask;
        whoever puts the parts together drops the clip on all ranks (the minimum of `usable` over
        them). Samples too short or with files that do not open are refused by all ranks alike.
        """
        sample = self.samples[index]
        clip = plan(lengths_of(sample), self.join, rng if self.anywhere else None)
        usable = True
        try:
            video = read_clip(sample, clip, self.size, self.part or slice(None))
        except Unusable:
            if self.part is None:
                raise
            frames = range(self.join.frames)[self.part]
            video, usable = np.zeros((len(frames), *self.size, 3), np.uint8), False
        prompts = clip.prompts([shot.caption for shot in sample.shots])
        return {
            "video": video,
            "mask": clip.mask * usable,
            "cut": clip.cut,
            "shot": clip.shot,
            "prompts": np.array(prompts),
            "usable": np.array(usable),
        }
