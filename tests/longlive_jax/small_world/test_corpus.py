"""Encoding, saving and validation of the corpus of encoded videos."""

import dataclasses
import shutil

import numpy as np
import pytest

from longlive_jax.io.builtin import builtin_checkpoint
from longlive_jax.small_world import corpus
from longlive_jax.small_world.corpus import CORPUS, CorpusSpec, encoded_corpus
from longlive_jax.spec import UserError

SPEC = CorpusSpec(videos=2, chunks=2, shot_chunks=(1, 2))


def encoded(workdir, spec=SPEC, *, seed=0, checkpoint=None):
    checkpoint = checkpoint or builtin_checkpoint()
    return encoded_corpus(spec, seed=seed, checkpoint=checkpoint, workdir=workdir)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Work directory with a saved corpus, and that corpus."""
    workdir = tmp_path_factory.mktemp("corpus")
    return workdir, encoded(workdir)


def test_a_saved_corpus_is_read_instead_of_encoded(saved, monkeypatch):
    workdir, videos = saved
    monkeypatch.setattr(corpus, "encode_videos", None)
    again = encoded(workdir)
    for name, column in vars(videos).items():
        np.testing.assert_array_equal(getattr(again, name), column)
    assert [path.name for path in workdir.iterdir()] == [CORPUS]


@pytest.mark.parametrize(
    ("changes", "seed", "message"),
    [
        ({"videos": 3}, 0, "made with videos = 2, this run has 3"),
        ({"shot_chunks": (1, 3)}, 0, "made with shot_chunks = [1, 2], this run has [1, 3]"),
        ({}, 1, "made with seed = 0, this run has 1"),
    ],
)
def test_a_corpus_of_other_settings_is_rejected(saved, changes, seed, message):
    with pytest.raises(UserError) as error:
        encoded(saved[0], dataclasses.replace(SPEC, **changes), seed=seed)
    assert message in str(error.value) and "another --workdir" in str(error.value)


def test_a_corpus_of_another_vae_is_rejected(saved, tmp_path):
    other = tmp_path / "checkpoint"
    shutil.copytree(builtin_checkpoint(), other)
    manifest = other / "longlive.json"
    manifest.write_text(manifest.read_text().replace("decoder.conv_in.bias", "renamed"))
    with pytest.raises(UserError, match="made with vae = "):
        encoded(saved[0], checkpoint=other)


@pytest.mark.parametrize("damage", ["truncated", "other"])
def test_a_damaged_corpus_is_reported(saved, tmp_path, damage):
    intact = (saved[0] / CORPUS).read_bytes()
    damaged = intact[: len(intact) // 2] if damage == "truncated" else b"no archive"
    (tmp_path / CORPUS).write_bytes(damaged)
    with pytest.raises(UserError, match=r"corpus\.npz: damaged"):
        encoded(tmp_path)


def test_a_corpus_without_an_origin_is_rejected(saved, tmp_path):
    np.savez(tmp_path / CORPUS, **vars(saved[1]))
    with pytest.raises(UserError, match="made with videos = None"):
        encoded(tmp_path)


def test_interrupted_encoding_continues_with_the_same_videos(tmp_path, monkeypatch):
    spec = CorpusSpec(videos=24, chunks=2, shot_chunks=(1, 2))
    uninterrupted = encoded(tmp_path / "uninterrupted", spec)
    workdir, calls = tmp_path / "interrupted", []
    encode_videos = corpus.encode_videos

    def interrupted(*args, skip, **kwargs):
        calls.append(skip)
        batches = encode_videos(*args, skip=skip, **kwargs)
        yield next(batches)
        if len(calls) < 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "encode_videos", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            encoded(workdir, spec)
    with pytest.raises(UserError, match=r"corpus_parts/00000\.npz: made with seed = 0"):
        encoded(workdir, spec, seed=1)
    videos = encoded(workdir, spec)
    assert calls == [0, 1, 2]
    for name, column in vars(uninterrupted).items():
        np.testing.assert_array_equal(getattr(videos, name), column)
    assert [path.name for path in workdir.iterdir()] == [CORPUS]
