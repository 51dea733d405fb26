"""Plans what `longlive data encode` stores: clips and their prompts, or scripts and theirs."""

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence

from longlive_jax.data.clips.clip_plan import ClipPlan, JoinSpec, plan_clips
from longlive_jax.data.clips.dataset import SourceShot, Unusable, VideoSample
from longlive_jax.data.clips.scripts import PromptScript
from longlive_jax.data.clips.source import shot_lengths
from longlive_jax.spec import UserError

__all__ = ["ClipJob", "EncodingPlan", "EncodingProgress", "plan_encoding", "plan_scripts"]

THREADS = 8
"""Samples whose headers are read at once."""

EncodingProgress = Callable[[str, int, int], None]
"""`progress(phase, done, total)`."""


@dataclasses.dataclass(frozen=True)
class ClipJob:
    """One clip to encode.

    Attributes:
      sample: the sample.
      clip: the frames that make up the clip.
    """

    sample: VideoSample
    clip: ClipPlan

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt of every chunk."""
        return self.clip.prompts([shot.caption for shot in self.sample.shots])


@dataclasses.dataclass(frozen=True)
class EncodingPlan:
    """The contents of a store.

    Attributes:
      jobs: its clips; empty for a store of scripts.
      scripts: its scripts; empty for a store of clips.
      prompts: distinct prompts in sorted order, so that the empty prompt is first.
      texts_per_clip: largest number of distinct prompts in one clip.
      skipped: samples without a clip, and why.
      digest: hash of everything that the clips, or the scripts, are derived from.
    """

    jobs: tuple[ClipJob, ...]
    scripts: tuple[PromptScript, ...]
    prompts: tuple[str, ...]
    texts_per_clip: int
    skipped: tuple[tuple[str, str], ...]
    digest: str


def plan_encoding(
    samples: Sequence[VideoSample],
    join: JoinSpec,
    limit: int,
    progress: EncodingProgress = lambda *_: None,
) -> EncodingPlan:
    """Plans the clips of a dataset, at most `limit` per sample (0 for as many as fit).

    Reads the headers of every file. Raises UserError if no clip fits.
    """

    def plan_sample(sample: VideoSample) -> list[ClipPlan] | Unusable:
        try:
            return plan_clips(shot_lengths(sample), join, limit)
        except Unusable as reason:
            return reason

    # 1. Plan every sample.
    jobs: list[ClipJob] = []
    skipped: list[tuple[str, str]] = []
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for i, clips in enumerate(pool.map(plan_sample, samples)):
            if isinstance(clips, Unusable):
                skipped.append((samples[i].name, str(clips)))
            else:
                jobs += [ClipJob(samples[i], clip) for clip in clips]
            progress("planning", i + 1, len(samples))
    if not jobs:
        raise _none_usable(samples, skipped)
    # 2. Collect their prompts.
    return EncodingPlan(
        jobs=tuple(jobs),
        scripts=(),
        prompts=_distinct(p for job in jobs for p in job.prompts),
        texts_per_clip=max(len(set(job.prompts)) for job in jobs),
        skipped=tuple(skipped),
        digest=_digest(map(_provenance, jobs)),
    )


def plan_scripts(
    scripts: Sequence[PromptScript], join: JoinSpec, negative_prompt: str
) -> EncodingPlan:
    """Plans scripts, and every prompt that their chunks could have; opens no file.

    These are all captions, with and without the cut prefix, and the negative prompt. Raises
    UserError if no script can be used.
    """
    good = [script for script in scripts if not script.problem]
    skipped = [(script.name, script.problem) for script in scripts if script.problem]
    if not good:
        raise _none_usable(scripts, skipped)
    captions = {shot.caption for script in good for shot in script.shots}
    captions |= {text.removeprefix(join.cut_prefix) for text in captions}
    prompts = _distinct(prefix + text for text in captions for prefix in ("", join.cut_prefix))
    return EncodingPlan(
        jobs=(),
        scripts=tuple(good),
        prompts=_distinct([*prompts, negative_prompt]),
        texts_per_clip=max(1, *(min(join.chunks, 2 * len(script.shots)) for script in good)),
        skipped=tuple(skipped),
        digest=_digest([*prompts, *map(_script_provenance, good)]),
    )


def _distinct(prompts: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({"", *prompts}))


def _none_usable(
    samples: Sequence[VideoSample | PromptScript], skipped: Sequence[tuple[str, str]]
) -> UserError:
    first = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
    return UserError(f"none of the {len(samples)} samples can be used ({first})")


def _provenance(job: ClipJob) -> tuple:
    """Everything that a clip is derived from: names, file sizes, captions, and frames.

    Its `repr` is hashed into the digest of existing stores (see `clip_plan.Piece`), so nothing in
    it may change.
    """
    shots = [
        (s.file.name, s.file.stat().st_size, s.caption, s.start, s.end) for s in job.sample.shots
    ]
    return job.sample.name, shots, job.clip.pieces


def _script_provenance(script: PromptScript) -> tuple:
    """Everything that a script is derived from: name, captions, chunks, cuts, and its image."""
    shots = [(shot.caption, shot.chunks, shot.cut) for shot in script.shots]
    image = script.image
    if isinstance(image, SourceShot):
        return script.name, shots, image.file.name, image.start
    return script.name, shots, None if image is None else (image.name, image.stat().st_size)


def _digest(values: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode())
    return digest.hexdigest()[:16]
