"""Settings of an encoding job, and the models that it runs."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from longlive_jax.data.clips.clip_plan import JoinSpec
from longlive_jax.spec import check_minimums

__all__ = ["EncodeSpec", "Encoders", "ReadFrames"]

ReadFrames = Callable[[int, int | None], np.ndarray]
"""`read(first, last)`: those raw frames of a clip, uint8 [n, h, w, 3]; None for all the rest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeSpec:
    """What is encoded, and how it is stored.

    The field names are stored in manifests (`store.Manifest.identity`).

    Attributes:
      join: joining rules for shots.
      size: (height, width) in pixels.
      windows: clips per sample, one after the other; 0 for as many as fit.
      text_len: rows of text features per prompt.
      dtype: storage dtype of the latents.
      text_dtype: storage dtype of the text features.
      shard: clips per file.
    """

    join: JoinSpec
    size: tuple[int, int]
    windows: int = 1
    text_len: int = 512
    dtype: Literal["float16", "float32"] = "float16"
    text_dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    shard: int = 64

    def __post_init__(self) -> None:
        check_minimums(self, windows=0, text_len=1, shard=1)


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The models, loaded when they are needed, and what identifies them.

    Attributes:
      load_text_encoder: loads the function prompt -> features [t, e] without padding.
      load_vae: loads the function `read_video(...)` -> latents [f, h, w, c].
      latent_bytes: bytes of one latent frame in float32, for the check of free disk space.
      identity: fingerprints of the models.
      read_video: reads the frames that the VAE takes, uint8 [r, h, w, 3]; by default all of
        the clip.
    """

    load_text_encoder: Callable[[], Callable[[str], np.ndarray]]
    load_vae: Callable[[], Callable[[np.ndarray], np.ndarray]]
    latent_bytes: int
    identity: Mapping[str, str]
    read_video: Callable[[ReadFrames], np.ndarray] = lambda read: read(0, None)
