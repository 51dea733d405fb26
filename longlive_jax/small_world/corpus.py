"""Encoded videos of the small world for stage `ar`, made once and kept in the work directory."""

import dataclasses
import json
import pathlib
import zipfile
from typing import Any

import numpy as np
from rich.progress import track

from longlive_jax.io.checkpoint import weights_of
from longlive_jax.io.models import load_model
from longlive_jax.parallel.hosts import first_process
from longlive_jax.small_world.windows import EncodedVideos, encode_videos
from longlive_jax.spec import UserError

CORPUS = "corpus.npz"
_BATCH = 8


@dataclasses.dataclass(frozen=True)
class CorpusSpec:
    """How many videos are encoded for the DiT, of how many chunks, with shots of how many."""

    videos: int = 800
    chunks: int = 24
    shot_chunks: tuple[int, int] = (3, 12)


def encoded_corpus(
    spec: CorpusSpec, *, seed: int, checkpoint: pathlib.Path, workdir: pathlib.Path
) -> EncodedVideos:
    """The videos of `spec` and `seed` as latents of the checkpoint's VAE.

    What an earlier run left in the work directory is used; UserError if that is something else. Of
    several processes each encodes all for itself, to the same numbers, and the first keeps them.
    """
    kept, origin = workdir / CORPUS, origin_of(spec, seed, checkpoint)
    if kept.exists():
        return _read(kept, origin)
    parts = encode_videos(
        load_model(checkpoint, "vae"),
        videos=spec.videos,
        chunks=spec.chunks,
        shot_chunks=spec.shot_chunks,
        seed=seed,
        batch=_BATCH,
    )
    total = -(-spec.videos // _BATCH)
    found = list(track(parts, "encoding", total=total, disable=not first_process()))
    fields: dict[str, Any] = {
        field.name: np.concatenate([getattr(part, field.name) for part in found])
        for field in dataclasses.fields(EncodedVideos)
    }
    if first_process():
        save_corpus(kept, EncodedVideos(**fields), origin)
    return EncodedVideos(**fields)


def origin_of(spec: CorpusSpec, seed: int, checkpoint: pathlib.Path) -> dict[str, Any]:
    """What a corpus depends on: settings, seed, and the weights of the VAE (their fingerprints)."""
    made = dataclasses.asdict(spec) | {"seed": seed, "vae": weights_of(checkpoint, "vae")}
    return json.loads(json.dumps(made))  # tuples become lists, as they will be when read


def save_corpus(path: pathlib.Path, videos: EncodedVideos, origin: dict[str, Any]) -> None:
    """Writes a corpus and what it was made of, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **vars(videos), origin=json.dumps(origin))
    partial.replace(path)


def _read(path: pathlib.Path, origin: dict[str, Any]) -> EncodedVideos:
    remedy = "give another --workdir, or remove that file to have it made anew"
    try:
        with np.load(path) as held:
            columns = {k: held[k] for k in held}
            made = json.loads(str(columns.pop("origin", "{}")))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged ({error}); {remedy}") from error
    for name, wanted in origin.items():
        if made.get(name) != wanted:
            raise UserError(
                f"{path}: made with {name} = {made.get(name)}, this run has {wanted}; {remedy}"
            )
    return EncodedVideos(**columns)
