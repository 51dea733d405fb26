"""Clips as the episodes that `training.ar.ar_loss` takes."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from longlive_jax.data.clips.latents import ClipLatents
from longlive_jax.layout import windows
from longlive_jax.typing import Float
from pallas_kernels.tokens import EMPTY

__all__ = ["collate", "episode_from_clip"]


def episode_from_clip(
    clip: ClipLatents, *, phase: int = 0, window: int | None = None, global_sinks: int = 1
) -> dict[str, np.ndarray]:
    """The clip in the reference's layout: every chunk clean as context, every chunk as a target.

    Returns the fields of `training.ar.Episode` for one sample. Without `window`, every chunk sees
    its whole past, as in the reference's training masks; with it, what the sampler's cache of
    `window` chunks would hold (`layout.windows`). `phase` is added to temporal positions at every
    cut: the reference's sampler adds 8 and its AR training nothing, so the default is 0.
    """
    chunks = len(clip.cut)
    size = len(clip.mask) // chunks
    since, sink = np.zeros(chunks, np.int32), np.full(chunks, EMPTY, np.int32)
    if window is not None:
        since, sink = map(
            np.asarray, windows(jnp.asarray(clip.cut), window=window, global_sinks=global_sinks)
        )
    columns = {
        "chunk": np.arange(chunks),
        "start": size * np.arange(chunks) + phase * clip.shot,
        "since": since,
        "sink": sink,
        "prompt": clip.prompt,
    }
    latents = clip.latents.astype(np.float32)
    twice = {name: np.tile(column, 2).astype(np.int32) for name, column in columns.items()}
    return {"context": latents, "target": latents, "mask": clip.mask} | twice


def collate(
    rows: Mapping[str, np.ndarray], empty: Float[np.ndarray, "t e"], **layout: int | None
) -> tuple[dict[str, np.ndarray], Float[np.ndarray, "b p+1 t e"]]:
    """Episodes of a batch of rows (`ClipLatents.row`, stacked), and a table of texts of each.

    The last row of every table is `empty`, the features of no prompt, for text dropout. `layout`
    goes to `episode_from_clip`.
    """
    names = [field.name for field in dataclasses.fields(ClipLatents)]
    clips = [
        ClipLatents(**{name: rows[name][i] for name in names}) for i in range(len(rows["mask"]))
    ]
    episodes = [episode_from_clip(clip, **layout) for clip in clips]  # type: ignore[arg-type]
    batch = {name: np.stack([episode[name] for episode in episodes]) for name in episodes[0]}
    last = np.broadcast_to(empty.astype(rows["text"].dtype), (len(clips), 1, *empty.shape))
    return batch, np.concatenate([rows["text"], last], axis=1)
