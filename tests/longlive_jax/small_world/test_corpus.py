"""A corpus is encoded once, kept whole, and never taken for another one."""

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
def kept(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("corpus")
    return workdir, encoded(workdir)


def test_what_is_kept_is_read_back_in_place_of_encoding(kept, monkeypatch):
    workdir, made = kept
    monkeypatch.setattr(corpus, "encode_videos", None)
    again = encoded(workdir)
    for name, column in vars(made).items():
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
def test_another_corpus_is_refused(kept, changes, seed, message):
    with pytest.raises(UserError) as error:
        encoded(kept[0], dataclasses.replace(SPEC, **changes), seed=seed)
    assert message in str(error.value) and "another --workdir" in str(error.value)


def test_a_corpus_of_another_vae_is_refused(kept, tmp_path):
    other = tmp_path / "checkpoint"
    shutil.copytree(builtin_checkpoint(), other)
    manifest = other / "longlive.json"
    manifest.write_text(manifest.read_text().replace("decoder.conv_in.bias", "renamed"))
    with pytest.raises(UserError, match="made with vae = "):
        encoded(kept[0], checkpoint=other)


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_corpus_is_said_to_be(kept, tmp_path, damage):
    whole = (kept[0] / CORPUS).read_bytes()
    (tmp_path / CORPUS).write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"no archive")
    with pytest.raises(UserError, match=r"corpus\.npz: damaged"):
        encoded(tmp_path)


def test_a_corpus_that_does_not_say_what_it_is_of_is_refused(kept, tmp_path):
    np.savez(tmp_path / CORPUS, **vars(kept[1]))
    with pytest.raises(UserError, match="made with videos = None"):
        encoded(tmp_path)
