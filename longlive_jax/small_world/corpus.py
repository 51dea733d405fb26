"""Encoded training videos of stage `ar`, cached in the work directory."""

import dataclasses
import json
import pathlib
import shutil
import zipfile
from typing import Any

import numpy as np
from rich.progress import track

from longlive_jax.io.checkpoint import weights_fingerprint
from longlive_jax.io.models import load_model
from longlive_jax.parallel.hosts import is_first_process
from longlive_jax.small_world.windows import EncodedVideos, encode_videos
from longlive_jax.spec import UserError

CORPUS = "corpus.npz"
PARTS = "corpus_parts"
"""Folder of the batches of a corpus that is not complete."""
_BATCH = 8


@dataclasses.dataclass(frozen=True)
class CorpusSpec:
    """Training videos of the DiT.

    Attributes:
      videos: number of videos.
      chunks: chunks per video.
      shot_chunks: minimum and maximum chunks per shot.
    """

    videos: int = 800
    chunks: int = 24
    shot_chunks: tuple[int, int] = (3, 12)


def encoded_corpus(
    spec: CorpusSpec, *, seed: int, checkpoint: pathlib.Path, workdir: pathlib.Path
) -> EncodedVideos:
    """The videos of `spec` and `seed`, encoded by the checkpoint's VAE.

    The corpus in the work directory is used if there is one. Otherwise every process encodes all
    videos, with identical results, and the first process saves them, batch by batch: after an
    interruption, encoding continues with the first batch that is missing.

    Raises:
      UserError: if the saved corpus is damaged or was made with other settings.
    """
    path, origin = workdir / CORPUS, origin_of(spec, seed, checkpoint)
    if path.exists():
        return _read(path, origin)
    # 1. Batches of an interrupted run, then the others.
    parts, total = workdir / PARTS, -(-spec.videos // _BATCH)
    batches = _saved_batches(parts, origin, total)
    encoded = encode_videos(
        load_model(checkpoint, "vae"),
        videos=spec.videos,
        chunks=spec.chunks,
        shot_chunks=spec.shot_chunks,
        seed=seed,
        batch=_BATCH,
        skip=len(batches),
    )
    text, hidden = "encoding videos (once; resumes after Ctrl-C)", not is_first_process()
    for batch in track(encoded, text, total=total, completed=len(batches), disable=hidden):
        if is_first_process():
            save_corpus(_part(parts, len(batches)), batch, origin)
        batches.append(batch)
    # 2. The corpus.
    fields: dict[str, Any] = {
        field.name: np.concatenate([getattr(batch, field.name) for batch in batches])
        for field in dataclasses.fields(EncodedVideos)
    }
    if is_first_process():
        save_corpus(path, EncodedVideos(**fields), origin)
        shutil.rmtree(parts, ignore_errors=True)
    return EncodedVideos(**fields)


def _saved_batches(parts: pathlib.Path, origin: dict[str, Any], total: int) -> list[EncodedVideos]:
    """The first batches that an interrupted run has saved, without a gap."""
    saved: list[EncodedVideos] = []
    while len(saved) < total and _part(parts, len(saved)).exists():
        saved.append(_read(_part(parts, len(saved)), origin))
    return saved


def _part(parts: pathlib.Path, index: int) -> pathlib.Path:
    return parts / f"{index:05d}.npz"


def origin_of(spec: CorpusSpec, seed: int, checkpoint: pathlib.Path) -> dict[str, Any]:
    """Everything that a corpus depends on: settings, seed and checksums of the VAE's weights."""
    origin = dataclasses.asdict(spec) | {
        "seed": seed,
        "vae": weights_fingerprint(checkpoint, "vae"),
    }
    return json.loads(json.dumps(origin))  # tuples become lists, as in a saved corpus


def save_corpus(path: pathlib.Path, videos: EncodedVideos, origin: dict[str, Any]) -> None:
    """Writes a corpus and its origin atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **vars(videos), origin=json.dumps(origin))
    partial.replace(path)


def _read(path: pathlib.Path, origin: dict[str, Any]) -> EncodedVideos:
    """The corpus at `path`; UserError if it is damaged or has another origin."""
    remedy = "give another --workdir, or remove that file to encode the videos again"
    try:
        with np.load(path) as archive:
            columns = {k: archive[k] for k in archive}
            saved = json.loads(str(columns.pop("origin", "{}")))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged ({error}); {remedy}") from error
    for name, wanted in origin.items():
        if saved.get(name) != wanted:
            raise UserError(
                f"{path}: made with {name} = {saved.get(name)}, this run has {wanted}; {remedy}"
            )
    return EncodedVideos(**columns)
