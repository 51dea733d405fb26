"""Batches of clips in the layout of the teacher-forcing loss."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from longlive_jax.data.clips.latents import ClipLatents
from longlive_jax.layout import full_history, windows
from longlive_jax.typing import Bool, Float, Int

__all__ = ["batch_from_clip", "collate", "token_columns"]


def batch_from_clip(clip: ClipLatents, **layout: int | None) -> dict[str, np.ndarray]:
    """One clip in the reference's layout: every chunk clean as context, every chunk as a target.

    Returns the fields of `training.objectives.teacher_forcing.TeacherForcingBatch` for one sample;
    `layout` is passed to `token_columns`.
    """
    latents = clip.latents.astype(np.float32)
    columns = token_columns(clip.cut, clip.shot, clip.prompt, len(clip.mask), **layout)  # type: ignore[arg-type]
    return {"context": latents, "target": latents, "mask": clip.mask} | columns


def token_columns(
    cut: Bool[np.ndarray, "k"],
    shot: Int[np.ndarray, "k"],
    prompt: Int[np.ndarray, "k"],
    latents: int,
    *,
    shot_rope_offset: int = 0,
    window: int | None = None,
    global_sinks: int = 1,
) -> dict[str, np.ndarray]:
    """The int32 columns [2k] of a teacher-forcing batch: `k` clean chunks, then `k` noisy ones.

    Without `window`, every chunk attends to its whole past, as in the reference's training masks.
    With it, a chunk attends to what the sampler's cache of `window` chunks would hold
    (`layout.windows`).

    Args:
      cut: chunks that begin a shot, except the first chunk.
      shot: number of cuts up to each chunk.
      prompt: each chunk's row in the table of text features.
      latents: latent frames of the clip.
      shot_rope_offset: offset added to temporal positions at every cut. The reference adds 8 in
        its sampler and nothing in AR training, so the default is 0.
      window: attention window in chunks, sinks and the chunk itself included.
      global_sinks: chunks at the beginning that every chunk attends to, given `window`.
    """
    chunks = len(cut)
    mask = full_history(chunks)
    if window is not None:
        bounds = windows(jnp.asarray(cut), window=window, global_sinks=global_sinks)
        mask["window_start"], mask["sink"] = map(np.asarray, bounds)
    columns = mask | {
        "start": latents // chunks * np.arange(chunks) + shot_rope_offset * shot,
        "prompt": prompt,
    }
    return {name: np.tile(column, 2).astype(np.int32) for name, column in columns.items()}


def collate(
    rows: Mapping[str, np.ndarray],
    empty_text_features: Float[np.ndarray, "t e"],
    **layout: int | None,
) -> tuple[dict[str, np.ndarray], Float[np.ndarray, "b p+1 t e"]]:
    """A teacher-forcing batch from stacked rows (`ClipLatents.row`), and its text features.

    Rows of `OnlineClips` have no latents yet, so their batch has no `context` and `target`. The
    last entry of each sample's text features is `empty_text_features`, for text dropout. `layout`
    is passed to `token_columns`.
    """
    count, latents = rows["mask"].shape
    flags = zip(rows["cut"], rows["shot"], rows["prompt"], strict=True)
    columns = [token_columns(*clip_flags, latents, **layout) for clip_flags in flags]  # type: ignore[arg-type]
    batch = {name: np.stack([clip[name] for clip in columns]) for name in columns[0]}
    batch["mask"] = rows["mask"]
    if "latents" in rows:
        batch["context"] = batch["target"] = rows["latents"].astype(np.float32)
    text_features = rows["text_features"]
    empty = empty_text_features.astype(text_features.dtype)
    last = np.broadcast_to(empty, (count, 1, *empty.shape))
    return batch, np.concatenate([text_features, last], axis=1)
