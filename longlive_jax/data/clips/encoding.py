"""Encodes a dataset to latents and text features on disk, so that training need do neither.

Encoding may be interrupted at any moment, by a kill or a full disk, and then resumes with what is
missing: every finished clip is a file in `parts/` until its shard is complete, every file is
written under a temporary name first, and a shard is renamed once it is written. A shard that was
lost or truncated since is encoded again. All distinct prompts of the dataset come first, so that
the text encoder has left the memory when the VAE is loaded.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.data.clips.dataset import Unusable, VideoSample
from longlive_jax.data.clips.encode_spec import Encoders, EncodeSpec
from longlive_jax.data.clips.encoding_plan import (
    ClipJob,
    EncodingPlan,
    EncodingProgress,
    plan_encoding,
    plan_scripts,
)
from longlive_jax.data.clips.latents import clip_latents
from longlive_jax.data.clips.records import dtype_of, pack_record, unpack_record
from longlive_jax.data.clips.script_records import write_scripts
from longlive_jax.data.clips.scripts import PromptScript
from longlive_jax.data.clips.source import read_clip
from longlive_jax.data.clips.store import (
    STORE_MANIFEST,
    Manifest,
    Shard,
    is_complete,
    with_shard,
    write_file,
    write_shard,
)
from longlive_jax.io.paths import check_writable
from longlive_jax.spec import Failure, UserError

__all__ = ["encode_dataset", "encode_scripts", "resumable"]

PROMPTS_PER_SHARD = 256
"""Prompts per file."""


def encode_dataset(
    samples: Sequence[VideoSample],
    out: Path,
    *,
    spec: EncodeSpec,
    encoders: Encoders,
    progress: EncodingProgress = lambda *_: None,
) -> Manifest:
    """Encodes the clips and prompts that `out` does not have yet, and returns its manifest.

    Raises UserError if there is nothing to encode, if `out` has other files or was encoded with
    other settings, or if the disk is too small; OSError if writing fails.
    """
    plan = plan_encoding(samples, spec.join, spec.windows, progress)
    return _encode(plan, out, {}, spec=spec, encoders=encoders, progress=progress)


def encode_scripts(
    scripts: Sequence[PromptScript],
    out: Path,
    *,
    spec: EncodeSpec,
    encoders: Encoders,
    negative_prompt: str = "",
    first_images: bool = False,
    progress: EncodingProgress = lambda *_: None,
) -> Manifest:
    """Encodes scripts and their prompts instead of clips; otherwise as `encode_dataset`.

    Every prompt that a clip of the scripts could have, wherever it begins, is encoded, and the
    negative prompt. With `first_images`, each script's image becomes one latent frame.
    """
    plan = plan_scripts(scripts, spec.join, negative_prompt)
    identity = {
        "scripts": len(plan.scripts),
        "negative_prompt": negative_prompt,
        "first_images": first_images,
    }
    return _encode(plan, out, identity, spec=spec, encoders=encoders, progress=progress)


def _encode(
    plan: EncodingPlan,
    out: Path,
    identity: Mapping[str, Any],
    *,
    spec: EncodeSpec,
    encoders: Encoders,
    progress: EncodingProgress,
) -> Manifest:
    """Encodes what `out` lacks of a plan; `identity` has entries for the manifest's."""
    # 1. Find what is missing.
    manifest = _open_manifest(out, plan, identity, spec, encoders)
    texts = _missing_shards(out, manifest.texts, len(plan.prompts), PROMPTS_PER_SHARD)
    clips = _missing_shards(out, manifest.clips, len(plan.jobs), spec.shard)
    scripts = _missing_shards(out, manifest.scripts, len(plan.scripts), spec.shard)
    if manifest.complete and not (texts or clips or scripts):
        return manifest
    _check_space(out, clips, spec, encoders)
    # 2. Encode prompts, then clips or scripts.
    manifest = dataclasses.replace(manifest, complete=False)
    manifest.write(out)
    manifest = _encode_texts(manifest, out, texts, plan.prompts, spec, encoders, progress)
    if plan.jobs:
        manifest = _encode_clips(manifest, out, clips, plan, spec, encoders, progress)
    if scripts:
        manifest = write_scripts(manifest, out, scripts, plan, spec, encoders, progress)
    # 3. Mark the store as complete.
    manifest = dataclasses.replace(manifest, complete=True)
    manifest.write(out)
    shutil.rmtree(out / "parts", ignore_errors=True)
    return manifest


@contextlib.contextmanager
def resumable(out: Path) -> Iterator[None]:
    """A block that encodes into `out`; an OSError in it becomes a Failure with the remedy."""
    try:
        yield
    except OSError as error:
        raise Failure(
            f"{out}: cannot be written ({error.strerror or error}); finished clips are safe: free "
            "some space and run the same command again"
        ) from error


def _missing_shards(
    out: Path, shards: Sequence[Shard], records: int, size: int
) -> dict[int, range]:
    """The records of each incomplete shard, by the shard's number.

    `records` records are stored `size` per shard. A shard counts only if its file is complete,
    whatever the manifest says.
    """
    numbered = enumerate(range(i, min(i + size, records)) for i in range(0, records, size))
    return {n: r for n, r in numbered if not (n < len(shards) and is_complete(out, shards[n]))}


def _open_manifest(
    out: Path,
    plan: EncodingPlan,
    more: Mapping[str, Any],
    spec: EncodeSpec,
    encoders: Encoders,
) -> Manifest:
    """The manifest in `out` if it belongs to this plan, or a new one if the folder is empty."""
    # 1. Resume.
    identity = json.loads(json.dumps(dataclasses.asdict(spec) | dict(encoders.identity)))
    identity |= {"clips": len(plan.jobs), "dataset": plan.digest} | dict(more)
    if (out / STORE_MANIFEST).is_file():
        manifest = Manifest.read(out)
        differs = [k for k in identity if manifest.identity.get(k) != identity[k]]
        if differs:
            raise UserError(
                f"{out}: was encoded with other settings ({', '.join(differs)}); choose another "
                "--out, or remove it"
            )
        for partial in [*out.glob(".*.writing-*"), *(out / "parts").glob(".*.writing-*")]:
            partial.unlink(missing_ok=True)
        return manifest
    # 2. Begin.
    check_writable(out)
    if any(out.iterdir()):
        raise UserError(f"{out}: holds other files; choose an empty or new folder")
    libraries = ("longlive-jax", "jax", "flax", "av", "grain", "array_record")
    return Manifest(
        identity=identity,
        versions={name: importlib.metadata.version(name) for name in libraries},
        unplanned=plan.skipped,
        texts_per_clip=plan.texts_per_clip,
        shots_per_script=max((len(script.shots) for script in plan.scripts), default=0),
    )


def _encode_texts(
    manifest: Manifest,
    out: Path,
    missing: Mapping[int, range],
    prompts: Sequence[str],
    spec: EncodeSpec,
    encoders: Encoders,
    progress: EncodingProgress,
) -> Manifest:
    """Encodes the prompts of the missing shards."""
    if not missing:
        return manifest
    encode, dtype = encoders.load_text_encoder(), dtype_of(spec.text_dtype)
    for number, indices in missing.items():

        def records(indices: range = indices) -> Iterator[bytes]:
            for i in indices:
                features = encode(prompts[i]).astype(dtype)
                yield pack_record({"features": features}, {"prompt": prompts[i]})
                progress("texts", i + 1, len(prompts))

        file = f"texts-{number:05d}.array_record"
        shard = Shard(file, write_shard(out / file, records()))
        manifest = dataclasses.replace(manifest, texts=with_shard(manifest.texts, number, shard))
        manifest.write(out)
    return manifest


def _check_space(
    out: Path, missing: Mapping[int, range], spec: EncodeSpec, encoders: Encoders
) -> None:
    """Raises UserError if the missing clips do not fit on the disk."""
    clips = sum(map(len, missing.values()))
    clip_bytes = encoders.latent_bytes * spec.join.latents * dtype_of(spec.dtype).itemsize // 4
    need = clip_bytes * (clips + min(clips, spec.shard))  # one shard exists twice, as parts too
    need -= sum(part.stat().st_size for part in (out / "parts").glob("*"))
    free = shutil.disk_usage(out).free
    if need > free:
        raise UserError(
            f"{out}: {clips} clips of {clip_bytes / 2**20:.1f} MiB need {need / 2**30:.1f} GiB, "
            f"but the disk has {free / 2**30:.1f} GiB left; free some space, or choose another "
            "--out or fewer clips"
        )


def _encode_clips(
    manifest: Manifest,
    out: Path,
    missing: Mapping[int, range],
    plan: EncodingPlan,
    spec: EncodeSpec,
    encoders: Encoders,
    progress: EncodingProgress,
) -> Manifest:
    """Encodes the clips of the missing shards. Raises UserError if none can be decoded."""
    # 1. Find the clips that have no part file yet.
    prompt_rows = {prompt: i for i, prompt in enumerate(plan.prompts)}
    jobs = plan.jobs
    parts = out / "parts"
    parts.mkdir(exist_ok=True)
    todo = [
        i for indices in missing.values() for i in indices if not _is_record(parts / f"{i:08d}")
    ]
    records, pending = _encoded_records(todo, jobs, prompt_rows, spec, encoders), set(todo)
    done = len(jobs) - len(todo)
    progress("clips", done, len(jobs))
    # 2. Encode them, shard by shard.
    for number, indices in missing.items():
        for i in indices:
            if i in pending:
                write_file(parts / f"{i:08d}", next(records))
                done += 1
                progress("clips", done, len(jobs))
        manifest = _close_shard(manifest, out, number, [parts / f"{i:08d}" for i in indices])
    if not any(shard.records for shard in manifest.clips):
        why = "; ".join(f"{name}: {reason}" for name, reason in manifest.skipped[:3])
        raise UserError(f"none of {len(jobs)} clips can be decoded ({why})")
    return manifest


def _close_shard(manifest: Manifest, out: Path, number: int, parts: Sequence[Path]) -> Manifest:
    """Joins parts into a shard, adds it to the manifest, and only then removes the parts."""
    clips, skipped = [], []
    for part in parts:
        _, meta = unpack_record(part.read_bytes())
        if meta["reason"]:
            skipped.append((meta["sample"], meta["reason"]))
        else:
            clips.append(part)
    file = f"clips-{number:05d}.array_record"
    written = write_shard(out / file, (part.read_bytes() for part in clips))
    shard = Shard(file, written, tuple(skipped))
    manifest = dataclasses.replace(manifest, clips=with_shard(manifest.clips, number, shard))
    manifest.write(out)
    for part in parts:
        part.unlink()
    return manifest


def _is_record(part: Path) -> bool:
    """Whether a part file exists and is undamaged."""
    try:
        unpack_record(part.read_bytes())
    except (FileNotFoundError, Unusable):
        return False
    return True


def _encoded_records(
    todo: Sequence[int],
    jobs: Sequence[ClipJob],
    prompt_rows: Mapping[str, int],
    spec: EncodeSpec,
    encoders: Encoders,
) -> Iterator[bytes]:
    """The records of the jobs in `todo`; decodes the next clip while one is encoded."""

    def decode(i: int) -> np.ndarray | Unusable:
        def read(first: int, last: int | None) -> np.ndarray:
            return read_clip(jobs[i].sample, jobs[i].clip, spec.size, slice(first, last))

        try:
            return encoders.read_video(read)
        except Unusable as reason:
            return reason

    if not todo:
        return
    encode, dtype = encoders.load_vae(), dtype_of(spec.dtype)
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        future = reader.submit(decode, todo[0])
        for i, following in itertools.zip_longest(todo, todo[1:]):
            video = future.result()
            if following is not None:
                future = reader.submit(decode, following)
            if isinstance(video, Unusable):
                yield pack_record({}, {"sample": jobs[i].sample.name, "reason": str(video)})
            else:
                yield _record(jobs[i], encode(video).astype(dtype), prompt_rows)


def _record(job: ClipJob, latents: np.ndarray, prompt_rows: Mapping[str, int]) -> bytes:
    """A clip's record, in which `texts` are the rows of its prompts in the store."""
    captions = [shot.caption for shot in job.sample.shots]
    clip = clip_latents(job.clip, captions, latents, lambda prompt: np.array(prompt_rows[prompt]))
    arrays = dict(vars(clip))
    arrays["texts"] = arrays.pop("text_features").astype(np.int32)
    return pack_record(arrays, {"sample": job.sample.name, "reason": ""})
