"""Batches of prompts: functions of the step, with the negative prompt last, on one device or 8."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.data.clips.dataset import find_samples
from longlive_jax.data.clips.encoding import encode_dataset, encode_scripts
from longlive_jax.data.clips.scripts import PromptScript, ScriptShot, sample_scripts
from longlive_jax.data.clips.store import EncodedClips
from longlive_jax.parallel.mesh import BATCH, MeshSpec, make_mesh
from longlive_jax.spec import UserError
from longlive_jax.training.stages.prompt_batches import (
    PromptBatchSpec,
    first_frame_shape,
    prompt_batches,
)
from tests.longlive_jax.data.clips.counting import SPEC, CountingEncoders
from tests.longlive_jax.data.clips.videos import write_sample

CAPTIONS = tuple("x" * (10 * i + 7) for i in range(5))
"""Captions of different lengths, which the stand-in encoder's features are."""
BATCHES = PromptBatchSpec(batch=4, chunks=3, chunks_per_shot=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Five scripts of one shot and one of two shots; features are the prompts' lengths."""
    scripts = [PromptScript(str(i), (ScriptShot(text),)) for i, text in enumerate(CAPTIONS)]
    two = PromptScript("two", (ScriptShot("one", 1), ScriptShot("three", 2)))
    return encode([*scripts, two], tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = write_sample(tmp_path_factory.mktemp("videos"), "a", 9)

    scripts = sample_scripts(find_samples(root))
    return encode(scripts, tmp_path_factory.mktemp("images"), first_images=True)


def encode(scripts, out, **options):
    encoders = CountingEncoders().encoders()
    options = {"spec": SPEC, "encoders": encoders, "negative_prompt": "dull"} | options
    encode_scripts(scripts, out, **options)
    return EncodedClips(out)


def mesh_of(data=1, fsdp=1):
    return make_mesh(MeshSpec(data, fsdp, 1), jax.devices()[: data * fsdp])


def read(batches, start, count):
    with batches.feed(start) as feed:
        return [next(feed) for _ in range(count)]


def test_contents_of_a_batch(store):
    batches = prompt_batches(store, mesh_of(), BATCHES)
    (batch,) = read(batches, 0, 1)
    assert batch.keys() == {"prompt", "cut", "text_features"}
    assert batch["prompt"].dtype == np.int32 and batch["cut"].dtype == bool
    assert batch["text_features"].shape == (4, 4, 6, 4)
    assert batch["text_features"].dtype == np.float32
    assert (batch["text_features"][:, -1, 0] == len("dull")).all()
    lengths = np.take_along_axis(batch["text_features"][:, :, 0, 0], batch["prompt"], axis=1)
    prefix = len(CUT_PREFIX)
    single = [[len(text), len(text), prefix + len(text)] for text in CAPTIONS]
    two = [3, prefix + 5, 5]
    for row, cut in zip(lengths.tolist(), batch["cut"].tolist(), strict=True):
        assert row in [*single, two]
        assert cut == ([False, True, False] if row == two else [False, False, True])


def test_an_epoch_has_every_script_once_and_epochs_differ(store):
    batches = prompt_batches(store, mesh_of(), dataclasses.replace(BATCHES, batch=3))
    firsts = [batch["text_features"][:, 0, 0, 0] for batch in read(batches, 0, 4)]
    epochs = [np.concatenate(firsts[:2]), np.concatenate(firsts[2:])]
    assert len(set(epochs[0])) == 6 and set(epochs[0]) == set(epochs[1])
    assert epochs[0].tolist() != epochs[1].tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_depends_on_its_step_alone(store, workers):
    spec = dataclasses.replace(BATCHES, workers=workers)
    batches = prompt_batches(store, mesh_of(), spec)
    uninterrupted = read(prompt_batches(store, mesh_of(), BATCHES), 0, 4)
    for want, got in zip(uninterrupted[2:], read(batches, 2, 2), strict=True):
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])


def test_the_mesh_splits_the_same_batch(store):
    full, split = (
        prompt_batches(store, mesh, dataclasses.replace(BATCHES, batch=8))
        for mesh in (mesh_of(), mesh_of(4, 2))
    )
    (want,), (got,) = read(full, 1, 1), read(split, 1, 1)
    on_mesh = split.put(got)
    for name, array in full.put(want).items():
        np.testing.assert_array_equal(on_mesh[name], array)
        assert on_mesh[name].sharding.spec[0] == P(BATCH)[0]
        assert {shard.data.shape[0] for shard in on_mesh[name].addressable_shards} == {1}


def test_first_frames(images):
    spec = PromptBatchSpec(batch=2, chunks=2, first_frames=True)
    (batch,) = read(prompt_batches(images, mesh_of(), spec), 0, 1)
    assert batch["first_frame"].shape == (2, 2, 4, 3) == (2, *first_frame_shape(images))
    assert batch["first_frame"].dtype == np.float32
    np.testing.assert_array_equal(batch["first_frame"][0], images.script(0)[0]["first_frame"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 3}, r"3 samples in a batch do not split over mesh\.data \* mesh\.fsdp = 2"),
        ({"accumulate": 4}, r"1 samples in a batch do not split over .*; choose a divisor: 1"),
        ({"accumulate": 3}, "batch = 4 does not divide by loop.accumulate = 3"),
        ({"first_frames": True}, "has no first images; encode the scripts into another folder"),
    ],
)
def test_what_does_not_fit_is_refused(store, change, message):
    with pytest.raises(UserError, match=message):
        prompt_batches(store, mesh_of(2), dataclasses.replace(BATCHES, **change))


def test_other_stores_are_refused(store, tmp_path):
    """Clips, and scripts of an earlier version without the negative prompt."""

    root = write_sample(tmp_path / "videos", "a", 30)
    encoders = CountingEncoders().encoders()
    encode_dataset(find_samples(root), tmp_path / "clips", spec=SPEC, encoders=encoders)
    with pytest.raises(UserError, match="has no scripts; encode them into another folder"):
        prompt_batches(EncodedClips(tmp_path / "clips"), mesh_of(), BATCHES)
    unmarked = EncodedClips(store.folder)
    del unmarked.manifest.identity["negative_prompt"]
    with pytest.raises(UserError, match="has no negative prompt"):
        prompt_batches(unmarked, mesh_of(), BATCHES)


def test_settings_have_minimums():
    with pytest.raises(ValueError, match="chunks must be >= 1, got 0"):
        PromptBatchSpec(batch=1, chunks=0)
