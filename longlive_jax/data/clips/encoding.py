"""A dataset to latents and text features on disk, so that training decodes and encodes nothing.

Encoding may stop at any moment, by a kill or a full disk, and goes on with what is missing: a
finished clip lies in `parts/` until its shard is whole, and a shard appears under its name when it
is written. Each file is written under another name first. A shard that has been lost or cut short
since is made anew. Prompts come first, all distinct ones of
the dataset, so that the text encoder has left the memory when the VAE arrives.
"""

import concurrent.futures
import dataclasses
import importlib.metadata
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from longlive_jax.data.clips.clip_plan import JoinSpec
from longlive_jax.data.clips.dataset import Sample, Unusable
from longlive_jax.data.clips.jobs import Job, Progress, Work, plan_jobs, plan_texts
from longlive_jax.data.clips.latents import clip_latents
from longlive_jax.data.clips.records import dtype_of, pack, unpack
from longlive_jax.data.clips.source import read_clip
from longlive_jax.data.clips.store import MANIFEST, Manifest, Shard, holds, write_file, write_shard
from longlive_jax.io.paths import check_writable
from longlive_jax.spec import UserError

__all__ = ["EncodeSpec", "Encoders", "encode_dataset"]

TEXTS = 256
"""Prompts of a file."""

Read = Callable[[int, int | None], np.ndarray]
"""`read(first, last)`: those frames of a clip, uint8 [n, h, w, 3]; None: to the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeSpec:
    """What is encoded, and how it is stored.

    Attributes:
      join: how shots become clips.
      size: height and width in pixels.
      windows: clips of a sample, one after the other; 0 is as many as it fills.
      text_len: rows of text features of a prompt.
      dtype: of the latents at rest.
      text_dtype: of the text features at rest.
      shard: clips of a file.
    """

    join: JoinSpec
    size: tuple[int, int]
    windows: int = 1
    text_len: int = 512
    dtype: Literal["float16", "float32"] = "float16"
    text_dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    shard: int = 64

    def __post_init__(self) -> None:
        least = {"windows": 0, "text_len": 1, "shard": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {bound}")


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The models, loaded when they are needed, and what tells them apart.

    Attributes:
      text: () -> (prompt -> features [t, e] without padding).
      video: () -> (what `frames` gave -> latents [f, h, w, c]).
      frames: which frames of a clip are decoded, and how they lie: uint8 [r, h, w, 3].
      latent_bytes: of one latent frame at float32, for the check of free disk space.
      identity: fingerprints.
    """

    text: Callable[[], Callable[[str], np.ndarray]]
    video: Callable[[], Callable[[np.ndarray], np.ndarray]]
    latent_bytes: int
    identity: Mapping[str, str]
    frames: Callable[[Read], np.ndarray] = lambda read: read(0, None)


def encode_dataset(
    samples: Sequence[Sample],
    out: Path,
    *,
    spec: EncodeSpec,
    encoders: Encoders,
    texts_only: bool = False,
    progress: Progress = lambda *_: None,
) -> Manifest:
    """Encodes what `out` does not hold yet and returns what it then holds.

    With `texts_only` that is every prompt that a clip could have, wherever it begins, and no clip.
    Raises UserError if there is nothing to encode, if `out` holds something else or the encoding of
    something else, or if the disk is too small; OSError if writing fails all the same.
    """
    if texts_only:
        work = plan_texts(samples, spec.join)
    else:
        work = plan_jobs(samples, spec.join, spec.windows, progress)
    manifest = _begin(out, work, spec, encoders)
    texts = _lost(out, manifest.texts, len(work.prompts), TEXTS)
    clips = _lost(out, manifest.clips, len(work.jobs), spec.shard)
    if manifest.complete and not texts and not clips:
        return manifest
    _check_space(out, clips, spec, encoders)
    manifest = dataclasses.replace(manifest, complete=False)
    manifest.write(out)
    manifest = _encode_texts(manifest, out, texts, work.prompts, spec, encoders, progress)
    if work.jobs:
        manifest = _encode_clips(manifest, out, clips, work, spec, encoders, progress)
    manifest = dataclasses.replace(manifest, complete=True)
    manifest.write(out)
    shutil.rmtree(out / "parts", ignore_errors=True)
    return manifest


def _lost(out: Path, shards: Sequence[Shard], records: int, size: int) -> dict[int, range]:
    """What is to be made of so many records, `size` of them a shard: by number, those of shards
    that are not on disk whole, whatever the manifest says."""
    numbered = enumerate(range(i, min(i + size, records)) for i in range(0, records, size))
    return {n: here for n, here in numbered if not (n < len(shards) and holds(out, shards[n]))}


def _put(shards: tuple[Shard, ...], number: int, shard: Shard) -> tuple[Shard, ...]:
    return (*shards[:number], shard, *shards[number + 1 :])


def _begin(out: Path, work: Work, spec: EncodeSpec, encoders: Encoders) -> Manifest:
    """The manifest in `out` if it is of this work, or a new one in an empty folder."""
    identity = json.loads(json.dumps(dataclasses.asdict(spec) | dict(encoders.identity)))
    identity |= {"clips": len(work.jobs), "dataset": work.digest}
    if (out / MANIFEST).is_file():
        held = Manifest.read(out)
        differs = [k for k in identity if held.identity.get(k) != identity[k]]
        if differs:
            raise UserError(
                f"{out}: holds clips that were encoded otherwise ({', '.join(differs)}); choose "
                "another --out, or remove it"
            )
        for torn in [*out.glob(".*.writing-*"), *(out / "parts").glob(".*.writing-*")]:
            torn.unlink(missing_ok=True)
        return held
    check_writable(out)
    if any(out.iterdir()):
        raise UserError(f"{out}: holds other files; choose an empty or new folder")
    libraries = ("longlive-jax", "jax", "flax", "av", "grain", "array_record")
    return Manifest(
        identity=identity,
        versions={name: importlib.metadata.version(name) for name in libraries},
        unplanned=work.lacking,
        texts_per_clip=work.texts_per_clip,
    )


def _encode_texts(
    manifest: Manifest,
    out: Path,
    lost: Mapping[int, range],
    prompts: Sequence[str],
    spec: EncodeSpec,
    encoders: Encoders,
    progress: Progress,
) -> Manifest:
    if not lost:
        return manifest
    encode, dtype = encoders.text(), dtype_of(spec.text_dtype)
    for number, here in lost.items():

        def records(here: range = here) -> Iterator[bytes]:
            for i in here:
                features = encode(prompts[i]).astype(dtype)
                yield pack({"features": features}, {"prompt": prompts[i]})
                progress("texts", i + 1, len(prompts))

        file = f"texts-{number:05d}.array_record"
        shard = Shard(file, write_shard(out / file, records()))
        manifest = dataclasses.replace(manifest, texts=_put(manifest.texts, number, shard))
        manifest.write(out)
    return manifest


def _check_space(
    out: Path, lost: Mapping[int, range], spec: EncodeSpec, encoders: Encoders
) -> None:
    """UserError if what is left to do does not fit on the disk."""
    left = sum(map(len, lost.values()))
    one = encoders.latent_bytes * spec.join.latents * dtype_of(spec.dtype).itemsize // 4
    need = one * (left + min(left, spec.shard))  # a shard and its parts exist side by side
    need -= sum(part.stat().st_size for part in (out / "parts").glob("*"))
    free = shutil.disk_usage(out).free
    if need > free:
        raise UserError(
            f"{out}: {left} clips of {one / 2**20:.1f} MiB need {need / 2**30:.1f} GiB, the disk "
            f"has {free / 2**30:.1f} GiB left; free some, or choose another --out or fewer clips"
        )


def _encode_clips(
    manifest: Manifest,
    out: Path,
    lost: Mapping[int, range],
    work: Work,
    spec: EncodeSpec,
    encoders: Encoders,
    progress: Progress,
) -> Manifest:
    rows = {prompt: i for i, prompt in enumerate(work.prompts)}
    jobs = work.jobs
    parts = out / "parts"
    parts.mkdir(exist_ok=True)
    left = [i for here in lost.values() for i in here if not _is_whole(parts / f"{i:08d}")]
    made, missing = _made(left, jobs, rows, spec, encoders), set(left)
    done = len(jobs) - len(left)
    progress("clips", done, len(jobs))
    for number, here in lost.items():
        for i in here:
            if i in missing:
                write_file(parts / f"{i:08d}", next(made))
                done += 1
                progress("clips", done, len(jobs))
        manifest = _close_shard(manifest, out, number, [parts / f"{i:08d}" for i in here])
    if not any(shard.records for shard in manifest.clips):
        why = "; ".join(f"{name}: {reason}" for name, reason in manifest.skipped[:3])
        raise UserError(f"none of {len(jobs)} clips can be decoded ({why})")
    return manifest


def _close_shard(manifest: Manifest, out: Path, number: int, parts: Sequence[Path]) -> Manifest:
    """Makes a shard of its parts, notes it in the manifest, and only then drops the parts."""
    whole, skipped = [], []
    for part in parts:
        _, meta = unpack(part.read_bytes())
        if meta["reason"]:
            skipped.append((meta["sample"], meta["reason"]))
        else:
            whole.append(part)
    file = f"clips-{number:05d}.array_record"
    written = write_shard(out / file, (part.read_bytes() for part in whole))
    shard = Shard(file, written, tuple(skipped))
    manifest = dataclasses.replace(manifest, clips=_put(manifest.clips, number, shard))
    manifest.write(out)
    for part in parts:
        part.unlink()
    return manifest


def _is_whole(part: Path) -> bool:
    try:
        unpack(part.read_bytes())
    except (FileNotFoundError, Unusable):
        return False
    return True


def _made(
    left: Sequence[int],
    jobs: Sequence[Job],
    rows: Mapping[str, int],
    spec: EncodeSpec,
    encoders: Encoders,
) -> Iterator[bytes]:
    """The records of the jobs that are left; the next clip is decoded while one is encoded."""

    def decoded(i: int) -> np.ndarray | Unusable:
        def read(first: int, last: int | None) -> np.ndarray:
            return read_clip(jobs[i].sample, jobs[i].clip, spec.size, slice(first, last))

        try:
            return encoders.frames(read)
        except Unusable as reason:
            return reason

    if not left:
        return
    encode, dtype = encoders.video(), dtype_of(spec.dtype)
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        coming = reader.submit(decoded, left[0])
        for i, after in itertools.zip_longest(left, left[1:]):
            video = coming.result()
            if after is not None:
                coming = reader.submit(decoded, after)
            if isinstance(video, Unusable):
                yield pack({}, {"sample": jobs[i].sample.name, "reason": str(video)})
            else:
                yield _record(jobs[i], encode(video).astype(dtype), rows)


def _record(job: Job, latents: np.ndarray, rows: Mapping[str, int]) -> bytes:
    captions = [shot.caption for shot in job.sample.shots]
    clip = clip_latents(job.clip, captions, latents, lambda prompt: np.array(rows[prompt]))
    arrays = dict(vars(clip))
    arrays["texts"] = arrays.pop("text").astype(np.int32)
    return pack(arrays, {"sample": job.sample.name, "reason": ""})
