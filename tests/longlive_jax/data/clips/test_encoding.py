"""Encoding to disk: what is stored, that nothing is encoded twice, and what is rejected.

The encoders are stand-ins that record their calls; `test_encoders` has real ones.
"""

import dataclasses
import errno
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.data.clips import encoding, store
from longlive_jax.data.clips.clip_plan import JoinSpec
from longlive_jax.data.clips.loader import ClipFeed, FeedSpec
from longlive_jax.data.clips.store import EncodedClips, Manifest
from longlive_jax.spec import UserError
from tests.longlive_jax.data.clips.counting import SPEC, CountingEncoders, encode
from tests.longlive_jax.data.clips.videos import write_caption


def test_contents_of_a_store(reference):
    out, manifest, encoders = reference
    clips = EncodedClips(out)
    assert manifest == clips.manifest and manifest.complete
    assert len(clips) == len(encoders.videos) == 2 + 2 + 2
    assert encoders.videos[:3] == [
        tuple(range(13)), tuple(range(13, 26)), (*range(5), *range(8))
    ]  # fmt: skip
    prompts = ["", CUT_PREFIX + "b shot 1", "a shot 0", "b shot 0", "b shot 1", "c shot 0"]
    assert encoders.prompts == prompts
    assert dict(manifest.skipped).keys() == {"c", "e"}
    assert "cannot be read past" in dict(manifest.skipped)["c"]
    assert "too short" in dict(manifest.skipped)["e"]
    assert {p.name for p in out.iterdir()} == {
        "manifest.json", "texts-00000.array_record",
        *(f"clips-{i:05d}.array_record" for i in range(3)),
    }  # fmt: skip
    assert manifest.versions["jax"] and manifest.identity["size"] == [32, 64]


def test_clip_of_two_shots(reference):
    clip = EncodedClips(reference[0])[2]
    assert clip.latents.shape == (4, 2, 4, 3) and clip.latents.dtype == np.float32
    assert clip.cut.tolist() == [False, True] and clip.shot.tolist() == [0, 1]
    assert clip.prompt.tolist() == [0, 1] and clip.mask.tolist() == [1] * 4
    lengths = [len("b shot 0"), len(CUT_PREFIX + "b shot 1")]
    assert clip.text_features.shape == (2, 6, 4)
    for row, length in zip(clip.text_features, lengths, strict=True):
        tokens = 1 + length % 5
        assert (row[:tokens] == length).all() and not row[tokens:].any()


def test_equal_prompts_are_stored_once(reference):
    clips = EncodedClips(reference[0])
    first, last = clips[0], clips[len(clips) - 1]
    np.testing.assert_array_equal(first.text_features, last.text_features)
    assert sum(s.records for s in clips.manifest.texts) == 6
    empty = clips.empty_text_features
    assert not empty[1:].any() and empty.shape == (6, 4)


def test_threads_and_processes_read_the_same_batches(reference):
    clips = EncodedClips(reference[0])
    runs = []
    for workers in (0, 1):
        with ClipFeed(clips, FeedSpec(batch=3, workers=workers)) as feed:
            runs.append([next(feed) for _ in range(3)])
    for batch, other in zip(*runs, strict=True):
        assert batch["latents"].shape == (3, 4, 2, 4, 3)
        assert batch["text_features"].shape == (3, 2, 6, 4)
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def assert_equal_stores(a, b):
    a, b = EncodedClips(a), EncodedClips(b)
    assert len(a) == len(b)
    for i in range(len(a)):
        for name, array in vars(a[i]).items():
            np.testing.assert_array_equal(array, vars(b[i])[name])


@pytest.mark.parametrize("stop_after", [0, 2, 3, 5])
def test_interrupted_and_resumed(dataset, reference, tmp_path, stop_after):
    """Finished clips are not encoded again, and the result is the same."""
    out, first, second = tmp_path / "out", CountingEncoders(stop_after), CountingEncoders()
    with pytest.raises(KeyboardInterrupt):
        encode(dataset, out, first)
    with pytest.raises(UserError, match="has not finished"):
        EncodedClips(out)
    (out / "parts" / ".00000001.writing-77").write_bytes(b"partial")
    manifest = encode(dataset, out, second)
    assert first.videos + second.videos == reference[2].videos and not second.prompts
    assert manifest.clips == reference[1].clips and manifest.skipped == reference[1].skipped
    assert_equal_stores(out, reference[0])
    assert not (out / "parts").exists() and not list(out.glob(".*"))
    third = CountingEncoders()
    encode(dataset, out, third)
    assert not third.loaded


def test_interrupted_between_a_shard_and_the_manifest(dataset, reference, tmp_path, monkeypatch):
    out, write = tmp_path / "out", Manifest.write

    def interrupt(self, folder):
        if len(self.clips) == 1:
            raise KeyboardInterrupt
        write(self, folder)

    monkeypatch.setattr(Manifest, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        encode(dataset, out, CountingEncoders())
    monkeypatch.undo()
    second = CountingEncoders()
    encode(dataset, out, second)
    assert len(second.videos) == len(reference[2].videos) - 3
    assert_equal_stores(out, reference[0])


def test_damaged_part_is_encoded_again(dataset, reference, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        encode(dataset, out, CountingEncoders(2))
    part = out / "parts" / "00000001"
    part.write_bytes(part.read_bytes()[:-5])
    second = CountingEncoders()
    encode(dataset, out, second)
    assert second.videos == reference[2].videos[1:]
    assert_equal_stores(out, reference[0])


def test_full_disk_loses_nothing(dataset, reference, tmp_path, monkeypatch):
    out, write = tmp_path / "out", encoding.write_file

    def write_until_full(path, content):
        if path.name == "00000004":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(encoding, "write_file", write_until_full)
    with pytest.raises(OSError, match="No space"):
        encode(dataset, out, CountingEncoders())
    monkeypatch.undo()
    second = CountingEncoders()
    encode(dataset, out, second)
    assert second.videos == reference[2].videos[4:]
    with pytest.raises(OSError, match="shard"):
        store.write_shard(pathlib.Path("/proc/nowhere/shard"), [b"x"])


def test_small_disk_is_detected_before_anything_is_encoded(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    encoders = CountingEncoders()
    with pytest.raises(UserError, match=r"7 clips of 0\.0 MiB need .* GiB, but the disk has"):
        encode(dataset, tmp_path / "out", encoders)
    assert not encoders.loaded


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"spec": dataclasses.replace(SPEC, size=(64, 64))}, "size"),
        ({"spec": dataclasses.replace(SPEC, join=JoinSpec(chunks=1, chunk_frames=2))}, "join"),
        ({"vae": "another"}, "vae"),
    ],
)
def test_other_settings_are_rejected_for_the_same_folder(dataset, reference, change, differs):
    before = (reference[0] / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=f"encoded with other settings .*{differs}"):
        encode(dataset, reference[0], CountingEncoders(), **change)
    assert (reference[0] / "manifest.json").read_bytes() == before


def test_changed_dataset_is_rejected(dataset, reference, tmp_path):
    write_caption(dataset, "a", 0, "something else")
    try:
        with pytest.raises(UserError, match=r"encoded with other settings \(dataset\)"):
            encode(dataset, reference[0], CountingEncoders())
    finally:
        write_caption(dataset, "a", 0, "a shot 0")


def test_invalid_folders(dataset, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="holds other files"):
        encode(dataset, tmp_path, CountingEncoders())
    with pytest.raises(UserError, match="no encoded clips"):
        EncodedClips(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 9}')
    with pytest.raises(UserError, match="format must be 1, got 9"):
        EncodedClips(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1, "texts": []}')
    with pytest.raises(UserError, match="damaged"):
        EncodedClips(tmp_path)
    short = dataclasses.replace(SPEC, join=JoinSpec(chunks=50))
    with pytest.raises(UserError, match="none of the 5 samples can be used"):
        encode(dataset, tmp_path / "new", CountingEncoders(), spec=short)


SLOW_ENCODING = """
import sys, time
from pathlib import Path
from tests.longlive_jax.data.clips.counting import CountingEncoders, encode
encoders = CountingEncoders()
encode_video = encoders.encode_video
def encode_slowly(frames):
    time.sleep(0.3)
    return encode_video(frames)
encoders.encode_video = encode_slowly
encode(Path(sys.argv[1]), Path(sys.argv[2]), encoders)
"""


def test_killed_and_resumed(dataset, reference, tmp_path, repository):
    """SIGKILL while clips are being written."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", SLOW_ENCODING, str(dataset), str(out)]
    process = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE)
    try:
        limit = time.monotonic() + 120
        while not (out / "parts" / "00000001").exists() and time.monotonic() < limit:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    done = len(list((out / "parts").glob("0*"))) + 3 * len(list(out.glob("clips-*")))
    assert done >= 2
    second = CountingEncoders()
    encode(dataset, out, second)
    assert len(second.videos) <= len(reference[2].videos) - 2
    assert_equal_stores(out, reference[0])
