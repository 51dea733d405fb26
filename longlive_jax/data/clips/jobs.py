"""What of a dataset is to be encoded: its clips and their prompts, or prompts alone."""

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence

from longlive_jax.data.clips.clip_plan import ClipPlan, JoinSpec, windows
from longlive_jax.data.clips.dataset import Sample, Unusable
from longlive_jax.data.clips.source import lengths_of
from longlive_jax.spec import UserError

__all__ = ["Job", "Progress", "Work", "plan_jobs", "plan_texts"]

OPENED = 8
"""Files whose headers are read at once."""

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and of how much."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One clip to encode."""

    sample: Sample
    clip: ClipPlan

    @property
    def prompts(self) -> tuple[str, ...]:
        """Of every chunk."""
        return self.clip.prompts([shot.caption for shot in self.sample.shots])


@dataclasses.dataclass(frozen=True)
class Work:
    """What a store is to hold.

    Attributes:
      jobs: its clips; none: it has prompts alone.
      prompts: distinct ones in sorted order, so that the empty one is first.
      texts_per_clip: most distinct prompts of one clip.
      lacking: samples that give nothing, and why.
      digest: of all that clips are made from, or of the prompts.
    """

    jobs: tuple[Job, ...]
    prompts: tuple[str, ...]
    texts_per_clip: int
    lacking: tuple[tuple[str, str], ...]
    digest: str


def plan_jobs(
    samples: Sequence[Sample], join: JoinSpec, most: int, progress: Progress = lambda *_: None
) -> Work:
    """The clips of a dataset, `most` of a sample (0: all it fills); opens every file.

    Raises UserError if there is none.
    """

    def planned(sample: Sample) -> list[ClipPlan] | Unusable:
        try:
            return windows(lengths_of(sample), join, most)
        except Unusable as reason:
            return reason

    jobs: list[Job] = []
    lacking: list[tuple[str, str]] = []
    with concurrent.futures.ThreadPoolExecutor(OPENED) as pool:
        for i, found in enumerate(pool.map(planned, samples)):
            if isinstance(found, Unusable):
                lacking.append((samples[i].name, str(found)))
            else:
                jobs += [Job(samples[i], clip) for clip in found]
            progress("planning", i + 1, len(samples))
    if not jobs:
        raise _nothing(samples, lacking)
    return Work(
        jobs=tuple(jobs),
        prompts=_distinct(p for job in jobs for p in job.prompts),
        texts_per_clip=max(len(set(job.prompts)) for job in jobs),
        lacking=tuple(lacking),
        digest=_digest(map(_made_from, jobs)),
    )


def plan_texts(samples: Sequence[Sample], join: JoinSpec) -> Work:
    """Every prompt that a clip could have, wherever it begins; no file is opened.

    Raises UserError if no sample can be used.
    """
    good = [sample for sample in samples if not sample.problem]
    lacking = [(sample.name, sample.problem) for sample in samples if sample.problem]
    if not good:
        raise _nothing(samples, lacking)
    captions = {shot.caption for sample in good for shot in sample.shots}
    prompts = _distinct(prefix + one for one in captions for prefix in ("", join.cut_prefix))
    return Work(
        jobs=(),
        prompts=prompts,
        texts_per_clip=max(1, *(min(join.chunks, 2 * len(sample.shots)) for sample in good)),
        lacking=tuple(lacking),
        digest=_digest(prompts),
    )


def _distinct(prompts: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({"", *prompts}))


def _nothing(samples: Sequence[Sample], lacking: Sequence[tuple[str, str]]) -> UserError:
    first = "; ".join(f"{name}: {reason}" for name, reason in lacking[:3])
    return UserError(f"none of the {len(samples)} samples can be used ({first})")


def _made_from(job: Job) -> tuple:
    """All that a clip is made from: names, files by size, captions, plans."""
    shots = [
        (s.file.name, s.file.stat().st_size, s.caption, s.start, s.end) for s in job.sample.shots
    ]
    return job.sample.name, shots, job.clip.pieces


def _digest(values: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode())
    return digest.hexdigest()[:16]
