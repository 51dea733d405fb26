"""Batches of clips from grain: shuffled, split over groups, resumable, with or without processes.

Row k of step i is a function of the seed, i and k alone. All samples are shuffled again for every
epoch (the reference repeats its first order), and each step takes the next B of them. A
data-parallel group reads its own rows of the batch: no two groups read the same sample in an epoch,
and the global batch does not depend on the number of groups.

An unusable sample is replaced by the one that its row gets some steps later in the epoch or, if a
row has no usable one, by any other. The replacement too depends on the position alone, so neither
resuming nor the number of workers changes a batch. Every row states how many samples it had to
skip; `ClipFeed` counts and logs them.
"""

import collections
import dataclasses
import itertools
import signal
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Protocol, Self

import grain
import numpy as np
from absl import flags, logging

from longlive_jax.data.clips.dataset import Unusable
from longlive_jax.spec import UserError, check_minimums

__all__ = ["ClipFeed", "ClipSource", "FeedSpec", "clip_dataset"]

MAX_TRIES = 64
"""Consecutive unusable samples after which a run gives up."""

ENDLESS = 2**40
"""Rows of a group: more than any run reads, and exact in the floats that grain divides them as."""


class ClipSource(Protocol):
    """Random access to training rows of fixed shapes."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """A sample's name, for messages."""
        ...

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Reads one row, with all randomness from `rng`. Raises Unusable."""
        ...


@dataclasses.dataclass(frozen=True)
class FeedSpec:
    """How rows become batches.

    Attributes:
      batch: rows per batch, over all data-parallel groups.
      rank: index of this process's group, which reads rows [rank, rank + 1) * batch / count. The
        processes of one sequence-parallel group have the same rank.
      count: number of data-parallel groups.
      seed: seed of the order and of all randomness in a row.
      workers: processes that make batches; 0 for threads of this process.
      threads: threads of this process, or of every worker.
      ahead: batches that are prefetched.
    """

    batch: int = 1
    rank: int = 0
    count: int = 1
    seed: int = 0
    workers: int = 0
    threads: int = 2
    ahead: int = 2

    def __post_init__(self) -> None:
        check_minimums(self, batch=1, count=1, seed=0, workers=0, threads=1, ahead=1)
        if not 0 <= self.rank < self.count:
            raise ValueError(f"rank must be from 0 to {self.count - 1}, got {self.rank}")
        if self.batch % self.count:
            raise ValueError(
                f"batch must be a multiple of the {self.count} data-parallel groups, "
                f"got {self.batch}"
            )

    @property
    def rows(self) -> int:
        """Rows of a batch that this group reads."""
        return self.batch // self.count


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The endless sequence of one group's rows.

    Attributes:
      source: where rows are read from.
      order: a grain MapDataset of sample indices; one epoch follows another.
      spec: the batches.
    """

    source: ClipSource
    order: Any
    spec: FeedSpec

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        step, row = divmod(int(i), self.spec.rows)
        position = step * self.spec.batch + self.spec.rank * self.spec.rows + row
        epoch, reasons = position // len(self.order), list[str]()
        for at in itertools.islice(self._candidates(position), MAX_TRIES):
            index = int(self.order[at])
            rng = np.random.default_rng((self.spec.seed, epoch, index, len(reasons)))
            try:
                columns = self.source.read(index, rng)
            except Unusable as reason:
                reasons.append(f"{self.source.name(index)}: {reason}")
                continue
            skipped = np.array(len(reasons), np.int32)
            return columns | {"skipped": skipped, "reasons": np.array("\n".join(reasons))}
        raise UserError(
            f"{len(reasons)} consecutive samples cannot be used ({'; '.join(reasons[:3])}); check "
            "the dataset with `longlive data check`"
        )

    def _candidates(self, position: int) -> Iterator[int]:
        """`position`, then those of its epoch in the same row of a batch, then all others."""
        samples, batch = len(self.order), self.spec.batch
        start = position // samples * samples
        same_row = range(start + (position - start) % batch, start + samples, batch)
        here = same_row.index(position)
        yield from same_row[here:]
        yield from same_row[:here]
        for i in range(1, samples):
            other = start + (position - start + i) % samples
            if (other - position) % batch:
                yield other


def clip_dataset(source: ClipSource, spec: FeedSpec) -> grain.MapDataset:
    """An endless dataset whose item `[i]` has this group's rows of step i.

    These are the source's columns, stacked, and two more: `skipped` [b], the number of samples
    skipped for each row, and `reasons` [b], one line for each of them. Raises UserError if the
    source is empty.
    """
    if not len(source):
        raise UserError("the dataset has no sample that can be used")
    # grain adds the epoch to the seed, so that neighbouring seeds would have orders in common.
    mixed = int(np.random.SeedSequence(spec.seed).generate_state(1)[0])
    order = grain.MapDataset.range(len(source)).seed(mixed).shuffle()
    return grain.MapDataset.source(_Rows(source, order, spec)).batch(spec.rows)


def _ignore_ctrl_c(_worker: int, _count: int) -> None:
    """Leaves Ctrl-C, which a terminal also sends to workers, to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class ClipFeed:
    """An endless iterator over batches from step `start` on; a context manager.

        with ClipFeed(source, spec, start=step) as feed:
            for batch in feed: ...

    Attributes:
      skipped: number of times that samples were skipped so far, by reason.
    """

    def __init__(self, source: ClipSource, spec: FeedSpec, *, start: int = 0):
        self.skipped: collections.Counter[str] = collections.Counter()
        options = grain.ReadOptions(num_threads=spec.threads, prefetch_buffer_size=spec.ahead)
        # Slicing, unlike a stored iterator state, resumes with any number of workers.
        batches = clip_dataset(source, spec)[start:].to_iter_dataset(options)
        if spec.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=spec.workers, per_worker_buffer_size=spec.ahead
                ),
                worker_init_fn=_ignore_ctrl_c,
            )
        self._batches: Iterator[dict[str, np.ndarray]] = iter(batches)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        # Copied, because the workers' shared memory ends with them.
        batch = {name: np.array(column) for name, column in next(self._batches).items()}
        for reason in "\n".join(batch.pop("reasons").tolist()).split("\n"):
            if reason and reason not in self.skipped:
                logging.warning("skipped %s", reason)
            if reason:
                self.skipped[reason] += 1
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; the iterator is empty afterwards.

        Without this call, or while the iterator is alive, grain logs long errors at exit.
        """
        batches, self._batches = self._batches, iter(())
        close = getattr(batches, "close", None)
        if close is not None:
            close()
