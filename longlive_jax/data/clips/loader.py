"""Clips to batches, on grain: shuffled, shared out, resumable, with or without processes.

What row k of step i gets is a function of the seed, i and k alone. All samples are shuffled anew
for every epoch (the reference repeats its first order), and steps take them off that order, B at a
time. A data-parallel group reads its own rows of the batch: groups never read the same sample in
an epoch, and the batch they make up together does not depend on how many they are.

A sample that turns out unusable is replaced by the one that its row gets some steps later in the
epoch (or, when a row has no usable one, by any other). That too is known from the position, so
neither resuming nor the number of workers changes a batch. Every row says how many samples it had
to pass over; `ClipFeed` counts and logs them.
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
from longlive_jax.spec import UserError

__all__ = ["ClipFeed", "FeedSpec", "Source", "clip_batches"]

TRIES = 64
"""Samples in a row that may be unusable before a run gives up."""

ENDLESS = 2**40
"""Rows of a group: more than any run reads; grain divides them as floats, which are exact here."""


class Source(Protocol):
    """Random access to training rows of fixed shapes."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call a sample in messages."""
        ...

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One row; all that is random in it comes from `rng`. Raises Unusable."""
        ...


@dataclasses.dataclass(frozen=True)
class FeedSpec:
    """How rows become batches.

    Attributes:
      batch: rows of a batch, of all data-parallel groups together.
      rank, count: which group this is, of how many: it reads rows [rank, rank + 1) * batch / count.
        Ranks of one sequence-parallel group are the same here.
      seed: of the order and of everything random in a row.
      workers: processes that make batches; 0 is threads of this process.
      threads: of this process, or of every worker.
      ahead: batches made before they are asked for.
    """

    batch: int = 1
    rank: int = 0
    count: int = 1
    seed: int = 0
    workers: int = 0
    threads: int = 2
    ahead: int = 2

    def __post_init__(self) -> None:
        least = {"batch": 1, "count": 1, "seed": 0, "workers": 0, "threads": 1, "ahead": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {bound}")
        if not 0 <= self.rank < self.count:
            raise ValueError(f"rank is {self.rank}; it must be from 0 to {self.count - 1}")
        if self.batch % self.count:
            raise ValueError(
                f"a batch of {self.batch} rows does not split over {self.count} data-parallel "
                f"groups; choose a multiple of {self.count}"
            )

    @property
    def rows(self) -> int:
        """Rows of a batch that this group reads."""
        return self.batch // self.count


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of one group, one after the other, without end."""

    source: Source
    order: Any  # MapDataset of sample indices; its epochs follow one another
    spec: FeedSpec

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        step, row = divmod(int(i), self.spec.rows)
        position = step * self.spec.batch + self.spec.rank * self.spec.rows + row
        epoch, reasons = position // len(self.order), list[str]()
        for at in itertools.islice(self._candidates(position), TRIES):
            index = int(self.order[at])
            rng = np.random.default_rng((self.spec.seed, epoch, index, len(reasons)))
            try:
                found = self.source.read(index, rng)
            except Unusable as reason:
                reasons.append(f"{self.source.name(index)}: {reason}")
                continue
            skipped, told = np.array(len(reasons), np.int32), np.array("\n".join(reasons))
            return found | {"skipped": skipped, "reasons": told}
        raise UserError(
            f"{len(reasons)} samples tried one after the other cannot be used "
            f"({'; '.join(reasons[:3])}); look at the dataset with `longlive data check`"
        )

    def _candidates(self, position: int) -> Iterator[int]:
        """The position, then those of its epoch in the same row of a batch, then all others."""
        samples, batch = len(self.order), self.spec.batch
        start = position // samples * samples
        same = range(start + (position - start) % batch, start + samples, batch)
        here = same.index(position)
        yield from same[here:]
        yield from same[:here]
        for i in range(1, samples):
            other = start + (position - start + i) % samples
            if (other - position) % batch:
                yield other


def clip_batches(source: Source, spec: FeedSpec) -> grain.MapDataset:
    """This group's rows of step i of the run as `[i]`, without end.

    The source's columns, stacked, and two more: `skipped` [b] counts the samples that were passed
    over for each row, `reasons` [b] has a line for each of them. Raises UserError if the source is
    empty.
    """
    if not len(source):
        raise UserError("the dataset has no sample that can be used")
    # grain counts epochs up from the seed, so that neighbouring seeds would share their orders.
    mixed = int(np.random.SeedSequence(spec.seed).generate_state(1)[0])
    order = grain.MapDataset.range(len(source)).seed(mixed).shuffle()
    return grain.MapDataset.source(_Rows(source, order, spec)).batch(spec.rows)


def _leave_ctrl_c(_worker: int, _count: int) -> None:
    """A terminal sends Ctrl-C to workers as well; the first process decides and ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class ClipFeed:
    """Batches from step `start` on, as an endless iterator; a context manager.

        with ClipFeed(source, spec, start=step) as feed:
            for batch in feed: ...

    Attributes:
      skipped: how often samples were passed over so far, by reason.
    """

    def __init__(self, source: Source, spec: FeedSpec, *, start: int = 0):
        self.skipped: collections.Counter[str] = collections.Counter()
        options = grain.ReadOptions(num_threads=spec.threads, prefetch_buffer_size=spec.ahead)
        # Slicing, rather than a saved iterator, resumes with any number of workers.
        batches = clip_batches(source, spec)[start:].to_iter_dataset(options)
        if spec.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain's workers ask for flags that nobody gave
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=spec.workers, per_worker_buffer_size=spec.ahead
                ),
                worker_init_fn=_leave_ctrl_c,
            )
        self._batches: Iterator[dict[str, np.ndarray]] = iter(batches)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        # Workers hand over shared memory, which is gone when they are.
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
        """Ends the workers; there are no batches after it.

        Without it, or with the iterator still alive, grain complains at length at the end of the
        program.
        """
        batches, self._batches = self._batches, iter(())
        close = getattr(batches, "close", None)
        if close is not None:
            close()
