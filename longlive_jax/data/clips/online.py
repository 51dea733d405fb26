"""Clips that are decoded while a model trains, with the text features of a store."""

import dataclasses
import functools

import numpy as np

from longlive_jax.data.clips.dataset import Unusable
from longlive_jax.data.clips.latents import pad_prompts
from longlive_jax.data.clips.source import VideoClips
from longlive_jax.data.clips.store import EncodedClips

__all__ = ["OnlineClips"]


@dataclasses.dataclass(frozen=True)
class OnlineClips:
    """`VideoClips` whose prompts are replaced by text features; a `loader.ClipSource`.

    Attributes:
      videos: the clips to decode.
      store: a store with the features of every prompt (`longlive data encode`, with clips or
        with --texts_only).
    """

    videos: VideoClips
    store: EncodedClips
    _rows: dict[str, int] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.videos)

    def name(self, index: int) -> str:
        """The sample's name, for messages."""
        return self.videos.name(index)

    @functools.cached_property
    def texts_per_clip(self) -> int:
        """Largest number of distinct prompts in one clip: every shot's, with and without a cut."""
        most = max((len(sample.shots) for sample in self.videos.samples), default=1)
        return min(self.videos.join.chunks, 2 * most)

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Reads one row: that of `VideoClips.read`, with two columns in place of `prompts`.

        These are `prompt` int32 [k], each chunk's row of `text_features`, and `text_features`
        [texts_per_clip, t, e]. Raises Unusable, also if the store does not have a prompt.
        """
        row = self.videos.read(index, rng)
        prompts = row.pop("prompts").tolist()
        distinct = list(dict.fromkeys(prompts))
        features = np.stack([self.store.text_features(self._row(text)) for text in distinct])
        prompt = np.array([distinct.index(text) for text in prompts], np.int32)
        return row | {
            "prompt": prompt,
            "text_features": pad_prompts(features, self.texts_per_clip),
        }

    def _row(self, prompt: str) -> int:
        """A prompt's row in the store."""
        if prompt not in self._rows:
            row = self.store.row(prompt)
            if row is None:
                raise Unusable(
                    f"{prompt[:60]!r} is not among the prompts of {self.store.folder}; encode them "
                    "with `longlive data encode --texts_only`"
                )
            self._rows[prompt] = row
        return self._rows[prompt]
