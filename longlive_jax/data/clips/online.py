"""Clips decoded while a model trains, with the text features of a store."""

import bisect
import dataclasses
import functools

import numpy as np

from longlive_jax.data.clips.dataset import Unusable
from longlive_jax.data.clips.latents import filled
from longlive_jax.data.clips.source import VideoClips
from longlive_jax.data.clips.store import EncodedClips

__all__ = ["LiveClips"]


@dataclasses.dataclass(frozen=True)
class LiveClips:
    """`VideoClips` whose prompts come as features; a `feed.Source`.

    Attributes:
      videos: what is decoded.
      store: with the features of every prompt (`longlive data encode`, with clips or without).
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
    def texts(self) -> int:
        """Most distinct prompts that a clip can have: every shot's, after a cut and without one."""
        most = max((len(sample.shots) for sample in self.videos.samples), default=1)
        return min(self.videos.join.chunks, 2 * most)

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The row of `VideoClips.read` with `prompt` [k] and `text` [texts, t, e] for `prompts`.

        Raises Unusable, also for a prompt that the store does not have.
        """
        row = self.videos.read(index, rng)
        prompts = row.pop("prompts").tolist()
        distinct = list(dict.fromkeys(prompts))
        text = np.stack([self.store.text(self._row(prompt)) for prompt in distinct])
        prompt = np.array([distinct.index(one) for one in prompts], np.int32)
        return row | {"prompt": prompt, "text": filled(text, self.texts)}

    def _row(self, prompt: str) -> int:
        if prompt not in self._rows:
            row = bisect.bisect_left(range(self.store.texts), prompt, key=self.store.prompt)
            if row == self.store.texts or self.store.prompt(row) != prompt:
                raise Unusable(
                    f"{prompt[:60]!r} is not among the prompts of {self.store.folder}; encode them "
                    "with `longlive data encode --texts_only`"
                )
            self._rows[prompt] = row
        return self._rows[prompt]
