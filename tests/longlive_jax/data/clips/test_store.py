"""Reading stores: damage and its repair, earlier versions, and stores of prompts alone."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.data.clips import store
from longlive_jax.data.clips.clip_plan import JoinSpec
from longlive_jax.data.clips.dataset import Unusable, find_samples
from longlive_jax.data.clips.encoding import encode_dataset
from longlive_jax.data.clips.loader import ClipFeed, FeedSpec
from longlive_jax.data.clips.store import EncodedClips
from longlive_jax.spec import UserError
from tests.longlive_jax.data.clips.counting import SPEC, CountingEncoders, encode, encode_texts


def test_damage_to_a_store(dataset, tmp_path):
    out = tmp_path / "out"
    encode(dataset, out, CountingEncoders())
    shard = out / "clips-00000.array_record"
    content = shard.read_bytes()
    middle = len(content) // 3
    at = content.index(b'"latents"')
    shard.write_bytes(content[: at + 300] + bytes([content[at + 300] ^ 1]) + content[at + 301 :])
    clips = EncodedClips(out)
    with pytest.raises(Unusable, match="damaged"):
        [clips[i] for i in range(3)]
    with ClipFeed(clips, FeedSpec(batch=2)) as feed:
        assert all(next(feed)["latents"].shape[0] == 2 for _ in range(4))
        assert any("damaged" in reason for reason in feed.skipped)
    shard.write_bytes(content[:middle])
    with pytest.raises((UserError, Unusable), match="damaged"):
        EncodedClips(out)[0]
    shard.unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        EncodedClips(out)


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "swapped"])
def test_encoding_again_replaces_only_damaged_shards(dataset, reference, tmp_path, damage):
    out = tmp_path / "out"
    shutil.copytree(reference[0], out)
    damaged = [out / "clips-00001.array_record", out / "texts-00000.array_record"]
    for file in damaged:
        content = file.read_bytes()
        file.unlink()
        if damage == "truncated":
            file.write_bytes(content[:-70])
        elif damage == "empty":
            file.write_bytes(b"")
        elif damage == "swapped":
            shutil.copy(out / "clips-00002.array_record", file)
    with pytest.raises(
        UserError, match="run the same `longlive data encode` again to replace them"
    ):
        EncodedClips(out)
    encoders = CountingEncoders()
    assert encode(dataset, out, encoders) == reference[1]
    assert encoders.videos == reference[2].videos[3:5] and encoders.prompts == reference[2].prompts
    for file in damaged:
        assert file.read_bytes() == (reference[0] / file.name).read_bytes()
    assert len(EncodedClips(out)) == 6 and not (out / "parts").exists()


def test_earlier_versions_are_read_and_resumed(dataset, reference, tmp_path):
    """Their manifests have `chunk` and `ratio` for `chunk_frames` and `temporal_stride`."""
    out = tmp_path / "out"
    shutil.copytree(reference[0], out)
    path = out / "manifest.json"
    values = json.loads(path.read_text())
    join = values["identity"]["join"]
    join["chunk"], join["ratio"] = join.pop("chunk_frames"), join.pop("temporal_stride")
    path.write_text(json.dumps(values))
    clips = EncodedClips(out)
    assert clips.manifest == reference[1] and clips[0].latents.shape == (4, 2, 4, 3)
    (out / "clips-00001.array_record").unlink()
    encoders = CountingEncoders()
    assert encode(dataset, out, encoders) == reference[1]
    assert encoders.videos == reference[2].videos[3:5] and not encoders.prompts
    assert json.loads(path.read_text()) == json.loads((reference[0] / "manifest.json").read_text())


def test_repair_can_be_interrupted_and_resumed(dataset, reference, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(reference[0], out)
    for i in (0, 2):
        (out / f"clips-{i:05d}.array_record").unlink()
    first, second = CountingEncoders(3), CountingEncoders()
    with pytest.raises(KeyboardInterrupt):
        encode(dataset, out, first)
    with pytest.raises(UserError, match="has not finished"):
        EncodedClips(out)
    assert encode(dataset, out, second) == reference[1]
    assert first.videos + second.videos == reference[2].videos[:3] + reference[2].videos[5:]


@pytest.mark.parametrize("content", ["", '{"format": 1, "te', '{"format": 9}'])
def test_unreadable_manifest(dataset, reference, tmp_path, content):
    """The error names the remedy."""
    out = tmp_path / "out"
    shutil.copytree(reference[0], out)
    (out / "manifest.json").write_text(content)
    for use in (EncodedClips, lambda out: encode(dataset, out, CountingEncoders())):
        with pytest.raises(UserError, match=f"remove {out} and encode the dataset again"):
            use(out)


def test_lack_of_disk_space_leaves_no_files(dataset, tmp_path):
    out, huge = tmp_path / "out", dataclasses.replace(SPEC, size=(10**6, 10**6))
    encoders = CountingEncoders()
    oversized = dataclasses.replace(encoders.encoders(), latent_bytes=2**50)
    with pytest.raises(UserError, match="clips of"):
        encode_dataset(find_samples(dataset), out, spec=huge, encoders=oversized)
    assert not list(out.iterdir())
    assert encode(dataset, out, encoders).complete


def flip_bits(file, *words):
    """Flips a bit after each of the words, which occur in the headers of records."""
    content = bytearray(file.read_bytes())
    for word in words:
        at = content.index(word) + 300
        content[at] ^= 1
    file.write_bytes(content)


def test_shape_and_chunks_do_not_depend_on_the_first_record(dataset, tmp_path):
    out = tmp_path / "out"
    encode(dataset, out, CountingEncoders())
    clips = EncodedClips(out)
    assert clips.shape == (4, 2, 4, 3) and clips.chunks == 2 and clips.num_prompts == 6
    assert [clips.prompt(row) for row in range(6)] == sorted(clips.prompt(row) for row in range(6))
    assert clips.prompt(0) == "" and clips.prompt(2) == "a shot 0"
    flip_bits(out / "clips-00000.array_record", b'"latents"')
    clips = EncodedClips(out)
    with pytest.raises(Unusable, match="damaged"):
        clips[0]
    assert clips.shape == (4, 2, 4, 3) and clips.chunks == 2


def test_store_without_a_readable_clip(dataset, tmp_path, monkeypatch):
    out = tmp_path / "out"
    encode(dataset, out, CountingEncoders())

    def damaged(record):
        raise Unusable("damaged record")

    monkeypatch.setattr(store, "unpack_record", damaged)
    clips = EncodedClips(out)
    with pytest.raises(
        UserError, match=r"out: none of its 6 clips can be read .*remove the folder"
    ):
        _ = clips.shape
    with pytest.raises(UserError, match=r"texts-00000\.array_record: the empty .*remove that file"):
        _ = clips.empty_text_features


def test_prompts_alone(dataset, reference, tmp_path):
    """Every prompt that a clip could have, wherever it begins; no video is opened."""
    out, encoders = tmp_path / "out", CountingEncoders()
    manifest = encode_texts(dataset, out, encoders)
    assert manifest.complete and encoders.loaded == {"text": 1}
    captions = ["a shot 0", "b shot 0", "b shot 1", "c shot 0", "e shot 0"]
    prompts = sorted(["", *captions, *(CUT_PREFIX + caption for caption in captions)])
    clips = EncodedClips(out)
    assert len(clips) == 0 and clips.num_prompts == len(prompts)
    assert [clips.prompt(row) for row in range(clips.num_prompts)] == prompts == encoders.prompts
    np.testing.assert_array_equal(
        clips.empty_text_features, EncodedClips(reference[0]).empty_text_features
    )
    assert {p.name for p in out.iterdir()} == {
        "manifest.json", "texts-00000.array_record",
        "scripts-00000.array_record", "scripts-00001.array_record",
    }  # fmt: skip
    with_clips, own = reference[1].identity, {"clips": 0, "scripts": 5, "first_images": False}
    assert manifest.identity == with_clips | own | {
        "negative_prompt": "", "dataset": manifest.identity["dataset"]
    }  # fmt: skip
    assert manifest.identity["dataset"] != with_clips["dataset"] and manifest.texts_per_clip == 2
    with pytest.raises(UserError, match="has prompts but no clips"):
        _ = clips.shape
    again = CountingEncoders()
    assert encode_texts(dataset, out, again) == manifest and not again.loaded
    with pytest.raises(UserError, match=r"encoded with other settings \(clips, dataset\)"):
        encode(dataset, out, CountingEncoders())


@pytest.mark.parametrize(("chunks", "texts"), [(1, 1), (3, 3), (9, 4)])
def test_texts_per_clip_covers_any_clip(dataset, tmp_path, chunks, texts):
    spec = dataclasses.replace(SPEC, join=JoinSpec(chunks=chunks, chunk_frames=2))
    assert encode_texts(dataset, tmp_path / "out", CountingEncoders(), spec).texts_per_clip == texts


def test_prompts_alone_are_resumed(dataset, tmp_path):
    out, encoders = tmp_path / "out", CountingEncoders()
    encode_text = encoders.encode_text

    def interrupt(prompt):
        if len(encoders.prompts) == 3:
            raise KeyboardInterrupt
        return encode_text(prompt)

    encoders.encode_text = interrupt
    with pytest.raises(KeyboardInterrupt):
        encode_texts(dataset, out, encoders)
    with pytest.raises(UserError, match="has not finished"):
        EncodedClips(out)
    assert (
        encode_texts(dataset, out, CountingEncoders()).complete
        and EncodedClips(out).num_prompts == 11
    )
