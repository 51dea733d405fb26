"""Encoded clips as training samples: latents, flags, and text features."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from longlive_jax.data.clips.clip_plan import ClipPlan
from longlive_jax.typing import Bool, Float, Int

__all__ = ["ClipLatents", "clip_latents", "pad_prompts"]


@dataclasses.dataclass(frozen=True)
class ClipLatents:
    """One training sample: `k` chunks of `m` latents, so `f = k m`, and `p` distinct prompts.

    Attributes:
      latents: normalised latents, float16 or float32.
      mask: 1 for real latents, 0 for padding.
      cut: whether each chunk begins a new shot; False for the first chunk.
      shot: number of cuts up to and including each chunk.
      prompt: row of `text_features` with each chunk's prompt.
      text_features: features of the prompts, zero after their last token.
    """

    latents: Float[np.ndarray, "f h w c"]
    mask: Float[np.ndarray, "f"]
    cut: Bool[np.ndarray, "k"]
    shot: Int[np.ndarray, "k"]
    prompt: Int[np.ndarray, "k"]
    text_features: Float[np.ndarray, "p t e"]

    def row(self, num_prompts: int) -> dict[str, np.ndarray]:
        """The arrays by name, with `text_features` padded to `num_prompts` so that clips stack."""
        return vars(self) | {"text_features": pad_prompts(self.text_features, num_prompts)}


def pad_prompts(
    text_features: Float[np.ndarray, "p t e"], num_prompts: int
) -> Float[np.ndarray, "n t e"]:
    """Text features padded with zeros to `num_prompts` prompts.

    Raises ValueError if there are more than that.
    """
    missing = num_prompts - len(text_features)
    if missing < 0:
        raise ValueError(f"prompts per clip must be <= {num_prompts}, got {len(text_features)}")
    zeros = np.zeros((missing, *text_features.shape[1:]), text_features.dtype)
    return np.concatenate([text_features, zeros])


def clip_latents(
    clip: ClipPlan,
    captions: Sequence[str],
    latents: np.ndarray,
    encode_prompt: Callable[[str], np.ndarray],
) -> ClipLatents:
    """Builds a training sample from a clip's plan, its shots' captions, and its latents.

    `encode_prompt` maps a prompt to its text features [t, e].
    """
    prompts = clip.prompts(captions)
    distinct = list(dict.fromkeys(prompts))
    return ClipLatents(
        latents=latents,
        mask=clip.mask,
        cut=clip.cut,
        shot=clip.shot,
        prompt=np.array([distinct.index(p) for p in prompts], np.int32),
        text_features=np.stack([encode_prompt(p) for p in distinct]),
    )
