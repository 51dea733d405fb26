"""Batches of prompts for distillation: scripts of a store, in chunks, and the negative prompt.

A batch has these arrays, of b scripts in n chunks:

- `prompt` int32 [b, n]: row of each chunk's prompt in `text_features`.
- `cut` bool [b, n]: whether each chunk begins with a cut.
- `text_features` float32 [b, p + 1, t, e]: the prompts of each script, then the negative one.
- `first_frame` float32 [b, h, w, c]: latents of the first frame, if they are asked for.

Row k of the batch of step i is a function of the seed, i and k alone (`data.clips.loader`).
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

from longlive_jax.data.clips.dataset import Unusable
from longlive_jax.data.clips.latents import pad_prompts
from longlive_jax.data.clips.loader import ClipFeed, FeedSpec
from longlive_jax.data.clips.script_records import EncodedScript
from longlive_jax.data.clips.store import EncodedClips
from longlive_jax.parallel.mesh import DATA, FSDP, check_batch_splits
from longlive_jax.spec import UserError, check_minimums
from longlive_jax.training.feed import Feed, process_rows
from longlive_jax.training.stages.stage import microbatch_size
from longlive_jax.training.task import SAMPLES, Batches, process_batches
from longlive_jax.typing import Float

__all__ = ["PromptBatchSpec", "PromptScripts", "first_frame_shape", "prompt_batches"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptBatchSpec:
    """How scripts become batches.

    Attributes:
      batch: scripts per batch, over all devices.
      chunks: chunks of every script.
      chunks_per_shot: chunks of each shot of scripts without durations; a script of one shot gets
        a cut after as many. 0: shots of equal lengths.
      first_frames: whether batches have `first_frame`.
      accumulate: microbatches per batch.
      seed: seed of the order.
      workers: processes that read scripts, beside this one (0: threads).
    """

    batch: int
    chunks: int
    chunks_per_shot: int = 0
    first_frames: bool = False
    accumulate: int = 1
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        check_minimums(self, batch=1, chunks=1, chunks_per_shot=0, accumulate=1, workers=0)


def prompt_batches(store: EncodedClips, mesh: Mesh, spec: PromptBatchSpec) -> Batches:
    """This process's rows of every batch.

    Raises UserError for a store without scripts, without the negative prompt or, with
    `first_frames`, without first frames, and for a batch that does not split over the mesh.
    """
    # 1. The mesh.
    try:
        rows = microbatch_size(spec.batch, spec.accumulate)
        check_batch_splits(rows, mesh.shape[DATA] * mesh.shape[FSDP])
    except ValueError as error:
        raise UserError(f"config: {error}") from error
    # 2. The store.
    scripts = PromptScripts(store, spec)
    negative = store.negative_text_features.astype(np.float32)
    feed = functools.partial(_feed, scripts, negative, mesh, spec)
    return process_batches(feed, mesh, SAMPLES, batch_size=spec.batch)


def first_frame_shape(store: EncodedClips) -> tuple[int, ...]:
    """Shape (h, w, c) of the latents of first frames in a store.

    Raises UserError if it has none, or none that can be read.
    """
    _check_first_frames(store)
    reasons = []
    for index in range(store.num_scripts):
        try:
            return store.script(index)[0]["first_frame"].shape
        except Unusable as reason:
            reasons.append(reason)
    raise UserError(f"{store.folder}: no first frame can be read ({reasons[0]})")


def _check_first_frames(store: EncodedClips) -> None:
    if not store.manifest.identity.get("first_images"):
        raise UserError(
            f"{store.folder}: has no first images; encode the scripts into another folder with "
            "`longlive data encode --texts_only --first_images=FOLDER`"
        )


class PromptScripts:
    """The scripts of a store as rows of a batch, without the negative prompt; a `ClipSource`.

    Attributes:
      num_prompts: prompts per row, without the negative one.
    """

    def __init__(self, store: EncodedClips, spec: PromptBatchSpec):
        """Raises UserError for a store without scripts, or without first frames if asked for."""
        if not store.num_scripts:
            raise UserError(
                f"{store.folder}: has no scripts; encode them into another folder with "
                "`longlive data encode --texts_only`, or with --scripts=FILE"
            )
        if spec.first_frames:
            _check_first_frames(store)
        self._store, self._spec = store, spec
        # A shot has at most two prompts: with the cut prefix, and without it.
        self.num_prompts = min(spec.chunks, 2 * store.manifest.shots_per_script)

    def __len__(self) -> int:
        return self._store.num_scripts

    def name(self, index: int) -> str:
        """A script's name, for messages."""
        return f"script {index} of {self._store.folder.name}"

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Reads one script; `rng` is not used. Raises Unusable for damaged records."""
        del rng
        arrays, _ = self._store.script(index)
        script = EncodedScript(**arrays)
        rows, cut = script.chunk_prompts(self._spec.chunks, self._spec.chunks_per_shot)
        distinct, prompt = np.unique(rows, return_inverse=True)
        features = np.stack([self._store.text_features(int(row)) for row in distinct])
        columns = {
            "prompt": prompt.astype(np.int32),
            "cut": cut,
            "text_features": pad_prompts(features.astype(np.float32), self.num_prompts),
        }
        if self._spec.first_frames:
            assert script.first_frame is not None  # the store has them
            columns["first_frame"] = script.first_frame.astype(np.float32)
        return columns


def _feed(
    scripts: PromptScripts,
    negative: Float[np.ndarray, "t e"],
    mesh: Mesh,
    spec: PromptBatchSpec,
    start: int,
) -> Feed:
    rows = process_rows(mesh, spec.batch)
    feed_spec = FeedSpec(
        batch=spec.batch,
        rank=rows.start // len(rows),
        count=spec.batch // len(rows),
        seed=spec.seed,
        workers=spec.workers,
    )
    return _PromptFeed(ClipFeed(scripts, feed_spec, start=start), negative)


class _PromptFeed(Feed):
    """Batches of a `ClipFeed` with the negative prompt; counts scripts that were skipped."""

    def __init__(self, feed: ClipFeed, negative: Float[np.ndarray, "t e"]):
        def batches() -> Iterator[dict[str, np.ndarray]]:
            for rows in feed:
                self.skipped += int(rows.pop("skipped").sum())
                features = rows["text_features"]
                last = np.broadcast_to(negative, (len(features), 1, *negative.shape))
                yield rows | {"text_features": np.concatenate([features, last], axis=1)}

        super().__init__(batches(), feed.close)
