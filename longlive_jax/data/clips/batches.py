"""Clips as the episodes that `training.objectives.teacher_forcing.ar_loss` takes."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from longlive_jax.data.clips.latents import ClipLatents
from longlive_jax.layout import windows
from longlive_jax.typing import Bool, Float, Int
from pallas_kernels.tokens import EMPTY

__all__ = ["batch_from_clip", "collate", "columns_of"]


def batch_from_clip(clip: ClipLatents, **layout: int | None) -> dict[str, np.ndarray]:
    """The clip in the reference's layout: every chunk clean as context, every chunk as a target.

    Returns the fields of `training.objectives.teacher_forcing.TeacherForcingBatch` for one sample;
    `layout` goes to `columns_of`.
    """
    latents = clip.latents.astype(np.float32)
    columns = columns_of(clip.cut, clip.shot, clip.prompt, len(clip.mask), **layout)  # type: ignore[arg-type]
    return {"context": latents, "target": latents, "mask": clip.mask} | columns


def columns_of(
    cut: Bool[np.ndarray, "k"],
    shot: Int[np.ndarray, "k"],
    prompt: Int[np.ndarray, "k"],
    latents: int,
    *,
    shot_rope_offset: int = 0,
    window: int | None = None,
    global_sinks: int = 1,
) -> dict[str, np.ndarray]:
    """The integer columns [2k] of the episode of a clip of so many latents.

    Without `window`, every chunk sees its whole past, as in the reference's training masks; with
    it, what the sampler's cache of `window` chunks would hold (`layout.windows`).
    `shot_rope_offset` is added to temporal positions at every cut: the reference's sampler adds 8
    and its AR training nothing, so the default is 0.
    """
    chunks = len(cut)
    window_start, sink = np.zeros(chunks, np.int32), np.full(chunks, EMPTY, np.int32)
    if window is not None:
        found = windows(jnp.asarray(cut), window=window, global_sinks=global_sinks)
        window_start, sink = map(np.asarray, found)
    columns = {
        "chunk_index": np.arange(chunks),
        "start": latents // chunks * np.arange(chunks) + shot_rope_offset * shot,
        "window_start": window_start,
        "sink": sink,
        "prompt": prompt,
    }
    return {name: np.tile(column, 2).astype(np.int32) for name, column in columns.items()}


def collate(
    rows: Mapping[str, np.ndarray], empty: Float[np.ndarray, "t e"], **layout: int | None
) -> tuple[dict[str, np.ndarray], Float[np.ndarray, "b p+1 t e"]]:
    """Episodes of a batch of rows (`ClipLatents.row`, stacked), and a table of texts of each.

    Rows of `LiveClips` have no latents yet, and then neither have the episodes. The last row of
    every table is `empty`, the features of no prompt, for text dropout. `layout` goes to
    `columns_of`.
    """
    count, latents = rows["mask"].shape
    flags = zip(rows["cut"], rows["shot"], rows["prompt"], strict=True)
    found = [columns_of(*one, latents, **layout) for one in flags]  # type: ignore[arg-type]
    batch = {name: np.stack([one[name] for one in found]) for name in found[0]}
    batch["mask"] = rows["mask"]
    if "latents" in rows:
        batch["context"] = batch["target"] = rows["latents"].astype(np.float32)
    last = np.broadcast_to(empty.astype(rows["text"].dtype), (count, 1, *empty.shape))
    return batch, np.concatenate([rows["text"], last], axis=1)
