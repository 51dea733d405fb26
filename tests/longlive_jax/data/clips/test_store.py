"""Stores read back: damage to them and its repair, and stores of texts alone."""

import dataclasses
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
from tests.longlive_jax.data.clips.counting import SPEC, Counting, run, texts_of


def test_damage_to_a_store(dataset, tmp_path):
    out = tmp_path / "out"
    run(dataset, out, Counting())
    shard = out / "clips-00000.array_record"
    content = shard.read_bytes()
    middle = len(content) // 3
    at = content.index(b'"latents"')
    spoilt = content[: at + 300] + bytes([content[at + 300] ^ 1]) + content[at + 301 :]
    shard.write_bytes(spoilt)
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


@pytest.mark.parametrize("damage", ["gone", "cut", "empty", "another's"])
def test_encoding_again_makes_only_the_shards_that_are_lost(dataset, whole, tmp_path, damage):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    lost = [out / "clips-00001.array_record", out / "texts-00000.array_record"]
    for file in lost:
        content = file.read_bytes()
        file.unlink()
        if damage == "cut":
            file.write_bytes(content[:-70])
        elif damage == "empty":
            file.write_bytes(b"")
        elif damage == "another's":
            shutil.copy(out / "clips-00002.array_record", file)
    with pytest.raises(UserError, match="run the same `longlive data encode` again, it makes them"):
        EncodedClips(out)
    counting = Counting()
    assert run(dataset, out, counting) == whole[1]
    assert counting.videos == whole[2].videos[3:5] and counting.prompts == whole[2].prompts
    for file in lost:
        assert file.read_bytes() == (whole[0] / file.name).read_bytes()
    assert len(EncodedClips(out)) == 6 and not (out / "parts").exists()


def test_the_repair_may_be_stopped_too(dataset, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    for i in (0, 2):
        (out / f"clips-{i:05d}.array_record").unlink()
    first, second = Counting(3), Counting()
    with pytest.raises(KeyboardInterrupt):
        run(dataset, out, first)
    with pytest.raises(UserError, match="has not finished"):
        EncodedClips(out)
    assert run(dataset, out, second) == whole[1]
    assert first.videos + second.videos == whole[2].videos[:3] + whole[2].videos[5:]


@pytest.mark.parametrize("content", ["", '{"format": 1, "te', '{"format": 9}'])
def test_a_manifest_that_cannot_be_read(dataset, whole, tmp_path, content):
    """What the message says does help."""
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    (out / "manifest.json").write_text(content)
    for use in (EncodedClips, lambda out: run(dataset, out, Counting())):
        with pytest.raises(UserError, match=f"remove {out} and encode the dataset again"):
            use(out)


def test_a_refusal_for_space_leaves_no_trace(dataset, tmp_path):
    out, huge = tmp_path / "out", dataclasses.replace(SPEC, size=(10**6, 10**6))
    counting = Counting()
    wanting = dataclasses.replace(counting.encoders(), latent_bytes=2**50)
    with pytest.raises(UserError, match="clips of"):
        encode_dataset(find_samples(dataset), out, spec=huge, encoders=wanting)
    assert not list(out.iterdir())
    assert run(dataset, out, counting).complete


def spoil(file, *words):
    """Flips a bit behind each of the words, which stand in the headers of records."""
    content = bytearray(file.read_bytes())
    for word in words:
        at = content.index(word) + 300
        content[at] ^= 1
    file.write_bytes(content)


def test_what_a_store_is_does_not_hang_on_its_first_record(dataset, tmp_path):
    out = tmp_path / "out"
    run(dataset, out, Counting())
    clips = EncodedClips(out)
    assert clips.shape == (4, 2, 4, 3) and clips.chunks == 2 and clips.texts == 6
    assert [clips.prompt(row) for row in range(6)] == sorted(clips.prompt(row) for row in range(6))
    assert clips.prompt(0) == "" and clips.prompt(2) == "a shot 0"
    spoil(out / "clips-00000.array_record", b'"latents"')
    clips = EncodedClips(out)
    with pytest.raises(Unusable, match="damaged"):
        clips[0]
    assert clips.shape == (4, 2, 4, 3) and clips.chunks == 2


def test_a_store_of_which_nothing_can_be_read(dataset, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(dataset, out, Counting())

    def damaged(record):
        raise Unusable("damaged record")

    monkeypatch.setattr(store, "unpack", damaged)
    clips = EncodedClips(out)
    with pytest.raises(
        UserError, match=r"out: none of its 6 clips can be read .*remove the folder"
    ):
        _ = clips.shape
    with pytest.raises(UserError, match=r"texts-00000\.array_record: the empty .*remove that file"):
        _ = clips.empty


def test_texts_alone(dataset, whole, tmp_path):
    """Every prompt that a clip could have wherever it begins, and no video is touched."""
    out, counting = tmp_path / "out", Counting()
    manifest = texts_of(dataset, out, counting)
    assert manifest.complete and counting.loaded == {"text": 1}
    captions = ["a shot 0", "b shot 0", "b shot 1", "c shot 0", "e shot 0"]
    prompts = sorted(["", *captions, *(CUT_PREFIX + one for one in captions)])
    clips = EncodedClips(out)
    assert len(clips) == 0 and clips.texts == len(prompts)
    assert [clips.prompt(row) for row in range(clips.texts)] == prompts == counting.prompts
    np.testing.assert_array_equal(clips.empty, EncodedClips(whole[0]).empty)
    assert {p.name for p in out.iterdir()} == {"manifest.json", "texts-00000.array_record"}
    theirs = whole[1].identity
    assert manifest.identity == theirs | {"clips": 0, "dataset": manifest.identity["dataset"]}
    assert manifest.identity["dataset"] != theirs["dataset"] and manifest.texts_per_clip == 2
    with pytest.raises(UserError, match="has texts alone"):
        _ = clips.shape
    again = Counting()
    assert texts_of(dataset, out, again) == manifest and not again.loaded
    with pytest.raises(UserError, match=r"encoded otherwise \(clips, dataset\)"):
        run(dataset, out, Counting())


@pytest.mark.parametrize(("chunks", "texts"), [(1, 1), (3, 3), (9, 4)])
def test_room_for_the_texts_of_any_clip(dataset, tmp_path, chunks, texts):
    spec = dataclasses.replace(SPEC, join=JoinSpec(chunks=chunks, chunk_frames=2))
    assert texts_of(dataset, tmp_path / "out", Counting(), spec).texts_per_clip == texts


def test_texts_alone_are_resumed(dataset, tmp_path):
    out, counting = tmp_path / "out", Counting()
    encode = counting.text

    def stopped(prompt):
        if len(counting.prompts) == 3:
            raise KeyboardInterrupt
        return encode(prompt)

    counting.text = stopped
    with pytest.raises(KeyboardInterrupt):
        texts_of(dataset, out, counting)
    with pytest.raises(UserError, match="has not finished"):
        EncodedClips(out)
    assert texts_of(dataset, out, Counting()).complete and EncodedClips(out).texts == 11
