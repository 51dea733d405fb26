"""Batches of clips for stage `clips`: encoded clips from a store, or videos encoded on the mesh."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.data.clips.batches import collate
from longlive_jax.data.clips.loader import ClipFeed, ClipSource, FeedSpec
from longlive_jax.data.clips.store import EncodedClips
from longlive_jax.parallel.mesh import BATCH
from longlive_jax.training.feed import Feed, process_rows
from longlive_jax.training.objectives import sharded
from longlive_jax.training.objectives.batch import TeacherForcingBatch
from longlive_jax.training.objectives.teacher_forcing import TextFeatures
from longlive_jax.training.stages.online_encoding import (
    count_dropped,
    make_online_encoder,
    online_clips,
)
from longlive_jax.training.task import Batches, process_batches
from longlive_jax.typing import Array

CLIP_BATCH_SPECS = sharded.BATCH_SPECS | {"text_features": P(BATCH)}
"""PartitionSpecs of a batch: a `TeacherForcingBatch`, and the text features of each sample."""


@dataclasses.dataclass(frozen=True)
class ClipData:
    """Clips to train on.

    Attributes:
      source: rows of clips by index.
      shape: latents of a clip, (f, h, w, c).
      chunks: chunks of a clip.
      num_prompts: rows of text features of a clip, without the empty prompt.
      notes: lines for the user.
      put: host batch -> batch on the mesh; None: only a transfer.
    """

    source: ClipSource
    shape: tuple[int, ...]
    chunks: int
    num_prompts: int
    notes: tuple[str, ...] = ()
    put: Callable[[Any], Any] | None = None

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of a chunk's latents, (m, h, w, c)."""
        return (self.shape[0] // self.chunks, *self.shape[1:])

    @property
    def chunk_tokens(self) -> int:
        """Tokens per chunk: one for every 2x2 patch."""
        frames, height, width, _ = self.chunk_shape
        return frames * (height // 2) * (width // 2)


def clip_data(
    clips: EncodedClips,
    videos: str | None,
    checkpoint: str,
    mesh: Mesh,
    *,
    anywhere: bool,
    batch_size: int,
) -> ClipData:
    """The clips of a store, or the clips of a video dataset, joined by the store's rules."""
    if videos is None:
        return ClipData(clips, clips.shape, clips.chunks, clips.manifest.texts_per_clip)
    online = online_clips(videos, clips, checkpoint, mesh, anywhere=anywhere)
    put = make_online_encoder(online, checkpoint, mesh, CLIP_BATCH_SPECS, batch_size)
    message = f"{online.left_out} samples of {videos} cannot be used; see `longlive data check`"
    notes = (message,) if online.left_out else ()
    return ClipData(
        online.source, online.shape, online.chunks, online.source.texts_per_clip, notes, put
    )


@dataclasses.dataclass(frozen=True)
class ClipBatchSpec:
    """How clips become batches.

    Attributes:
      batch_size: clips per batch, over all devices.
      seed: seed of the order.
      workers: processes that read clips, beside this one (0: threads).
      columns: settings of `data.clips.batches.token_columns`.
    """

    batch_size: int
    seed: int
    workers: int
    columns: Mapping[str, Any]


def collated_batches(
    source: ClipSource,
    empty: np.ndarray,
    mesh: Mesh,
    spec: ClipBatchSpec,
    put: Callable[[Any], Any] | None = None,
) -> Batches:
    """This process's rows of every batch, collated; `empty` has the empty prompt's features."""
    batches = process_batches(
        functools.partial(_feed, source, empty, mesh, spec),
        mesh,
        CLIP_BATCH_SPECS,
        batch_size=spec.batch_size,
    )
    return batches if put is None else dataclasses.replace(batches, put=put)


def split_inputs(arrays: Mapping[str, Array]) -> tuple[TeacherForcingBatch, TextFeatures]:
    """Splits the arrays of a batch into the `TeacherForcingBatch` and the text features."""
    columns = dict(arrays)
    text_features = columns.pop("text_features")
    return TeacherForcingBatch(**columns), text_features


def _feed(
    source: ClipSource, empty: np.ndarray, mesh: Mesh, spec: ClipBatchSpec, start: int
) -> Feed:
    rows = process_rows(mesh, spec.batch_size)
    feed_spec = FeedSpec(
        batch=spec.batch_size,
        rank=rows.start // len(rows),
        count=spec.batch_size // len(rows),
        seed=spec.seed,
        workers=spec.workers,
    )
    feed = ClipFeed(source, feed_spec, start=start)
    return _CollatedFeed(feed, functools.partial(_collated, empty, spec.columns))


def _collated(
    empty: np.ndarray, columns: Mapping[str, Any], rows: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Rows of clips as a batch; videos that are still to be encoded are passed on."""
    batch, text_features = collate(rows, empty, **columns)
    undecoded = {k: rows[k] for k in ("video", "dropped") if k in rows}
    return batch | {"text_features": text_features} | undecoded


class _CollatedFeed(Feed):
    """Collated batches of a `ClipFeed`; counts samples that were skipped."""

    def __init__(self, clips: ClipFeed, collated: Callable[[dict], dict[str, np.ndarray]]):
        def batches() -> Iterator[dict[str, np.ndarray]]:
            for rows in clips:
                self.skipped += int(rows.pop("skipped").sum())
                if "dropped" in rows:
                    self.skipped += count_dropped(rows["dropped"])
                yield collated(rows)

        super().__init__(batches(), clips.close)
