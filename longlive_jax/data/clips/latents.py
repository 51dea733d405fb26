"""Clips as the trainer takes them: latents, flags, and text features."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from longlive_jax.data.clips.clip_plan import ClipPlan
from longlive_jax.typing import Bool, Float, Int

__all__ = ["ClipLatents", "clip_latents", "filled"]


@dataclasses.dataclass(frozen=True)
class ClipLatents:
    """One training sample: `k` chunks of `m` latents, so `f = k m`, and `p` distinct prompts.

    Attributes:
      latents: normalised, float16 or float32.
      mask: 1 where a latent counts, 0 where it is padding.
      cut: which chunks begin a shot, the first chunk aside.
      shot: number of cuts up to each chunk.
      prompt: every chunk's row of `text`.
      text: features of the prompts, zero beyond their tokens.
    """

    latents: Float[np.ndarray, "f h w c"]
    mask: Float[np.ndarray, "f"]
    cut: Bool[np.ndarray, "k"]
    shot: Int[np.ndarray, "k"]
    prompt: Int[np.ndarray, "k"]
    text: Float[np.ndarray, "p t e"]

    def row(self, texts: int) -> dict[str, np.ndarray]:
        """The arrays by name, with `text` filled up to `texts` rows so that rows can be stacked."""
        return vars(self) | {"text": filled(self.text, texts)}


def filled(text: Float[np.ndarray, "p t e"], texts: int) -> Float[np.ndarray, "n t e"]:
    """Features with rows of zeros behind them, `texts` in all; ValueError if there are more."""
    lacking = texts - len(text)
    if lacking < 0:
        raise ValueError(f"a clip has {len(text)} prompts, room is made for {texts}")
    return np.concatenate([text, np.zeros((lacking, *text.shape[1:]), text.dtype)])


def clip_latents(
    clip: ClipPlan,
    captions: Sequence[str],
    latents: np.ndarray,
    text: Callable[[str], np.ndarray],
) -> ClipLatents:
    """A training sample from a clip's latents, its shots' captions, and prompt -> features."""
    prompts = clip.prompts(captions)
    distinct = list(dict.fromkeys(prompts))
    return ClipLatents(
        latents=latents,
        mask=clip.mask,
        cut=clip.cut,
        shot=clip.shot,
        prompt=np.array([distinct.index(p) for p in prompts], np.int32),
        text=np.stack([text(p) for p in distinct]),
    )
