"""Encoding to disk: what is stored, that nothing is made twice, and what a store refuses.

The encoders are stand-ins that count; `test_encoders` has real ones.
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
from tests.longlive_jax.data.clips.counting import SPEC, Counting, run
from tests.longlive_jax.data.clips.videos import write_caption


def test_what_is_stored(whole):
    out, manifest, counting = whole
    clips = EncodedClips(out)
    assert manifest == clips.manifest and manifest.complete
    assert len(clips) == len(counting.videos) == 2 + 2 + 2
    assert counting.videos[:3] == [
        tuple(range(13)), tuple(range(13, 26)), (*range(5), *range(8))
    ]  # fmt: skip
    prompts = ["", CUT_PREFIX + "b shot 1", "a shot 0", "b shot 0", "b shot 1", "c shot 0"]
    assert counting.prompts == prompts
    assert dict(manifest.skipped).keys() == {"c", "e"}
    assert "cannot be read past" in dict(manifest.skipped)["c"]
    assert "too short" in dict(manifest.skipped)["e"]
    assert {p.name for p in out.iterdir()} == {
        "manifest.json", "texts-00000.array_record",
        *(f"clips-{i:05d}.array_record" for i in range(3)),
    }  # fmt: skip
    assert manifest.versions["jax"] and manifest.identity["size"] == [32, 64]


def test_a_clip_that_joins_two_shots(whole):
    clip = EncodedClips(whole[0])[2]
    assert clip.latents.shape == (4, 2, 4, 3) and clip.latents.dtype == np.float32
    assert clip.cut.tolist() == [False, True] and clip.shot.tolist() == [0, 1]
    assert clip.prompt.tolist() == [0, 1] and clip.mask.tolist() == [1] * 4
    lengths = [len("b shot 0"), len(CUT_PREFIX + "b shot 1")]
    assert clip.text.shape == (2, 6, 4)
    for row, length in zip(clip.text, lengths, strict=True):
        tokens = 1 + length % 5
        assert (row[:tokens] == length).all() and not row[tokens:].any()


def test_equal_prompts_are_stored_once(whole):
    clips = EncodedClips(whole[0])
    first, last = clips[0], clips[len(clips) - 1]
    np.testing.assert_array_equal(first.text, last.text)
    assert sum(s.records for s in clips.manifest.texts) == 6
    assert not clips.empty[1:].any() and clips.empty.shape == (6, 4)


def test_training_reads_it_in_threads_and_processes(whole):
    clips = EncodedClips(whole[0])
    found = []
    for workers in (0, 1):
        with ClipFeed(clips, FeedSpec(batch=3, workers=workers)) as feed:
            found.append([next(feed) for _ in range(3)])
    for one, other in zip(*found, strict=True):
        assert one["latents"].shape == (3, 4, 2, 4, 3) and one["text"].shape == (3, 2, 6, 4)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def equal_stores(a, b):
    a, b = EncodedClips(a), EncodedClips(b)
    assert len(a) == len(b)
    for i in range(len(a)):
        for name, array in vars(a[i]).items():
            np.testing.assert_array_equal(array, vars(b[i])[name])


@pytest.mark.parametrize("stop_after", [0, 2, 3, 5])
def test_stopped_and_resumed(dataset, whole, tmp_path, stop_after):
    """Nothing that was finished is encoded again, and the result is the same."""
    out, first, second = tmp_path / "out", Counting(stop_after), Counting()
    with pytest.raises(KeyboardInterrupt):
        run(dataset, out, first)
    with pytest.raises(UserError, match="has not finished"):
        EncodedClips(out)
    (out / "parts" / ".00000001.writing-77").write_bytes(b"torn")
    manifest = run(dataset, out, second)
    assert first.videos + second.videos == whole[2].videos and not second.prompts
    assert manifest.clips == whole[1].clips and manifest.skipped == whole[1].skipped
    equal_stores(out, whole[0])
    assert not (out / "parts").exists() and not list(out.glob(".*"))
    third = Counting()
    run(dataset, out, third)
    assert not third.loaded


def test_stopped_between_a_shard_and_the_manifest(dataset, whole, tmp_path, monkeypatch):
    out, write = tmp_path / "out", Manifest.write

    def stopped(self, folder):
        if len(self.clips) == 1:
            raise KeyboardInterrupt
        write(self, folder)

    monkeypatch.setattr(Manifest, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(dataset, out, Counting())
    monkeypatch.undo()
    second = Counting()
    run(dataset, out, second)
    assert len(second.videos) == len(whole[2].videos) - 3
    equal_stores(out, whole[0])


def test_a_damaged_part_is_made_again(dataset, whole, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(dataset, out, Counting(2))
    part = out / "parts" / "00000001"
    part.write_bytes(part.read_bytes()[:-5])
    second = Counting()
    run(dataset, out, second)
    assert second.videos == whole[2].videos[1:]
    equal_stores(out, whole[0])


def test_a_full_disk_loses_nothing(dataset, whole, tmp_path, monkeypatch):
    out, write = tmp_path / "out", encoding.write_file

    def full(path, content):
        if path.name == "00000004":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(encoding, "write_file", full)
    with pytest.raises(OSError, match="No space"):
        run(dataset, out, Counting())
    monkeypatch.undo()
    second = Counting()
    run(dataset, out, second)
    assert second.videos == whole[2].videos[4:]
    with pytest.raises(OSError, match="shard"):
        store.write_shard(pathlib.Path("/proc/nowhere/shard"), [b"x"])


def test_a_disk_too_small_is_found_before_anything_is_encoded(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    counting = Counting()
    with pytest.raises(UserError, match=r"7 clips of 0\.0 MiB need .* GiB, the disk has"):
        run(dataset, tmp_path / "out", counting)
    assert not counting.loaded


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"spec": dataclasses.replace(SPEC, size=(64, 64))}, "size"),
        ({"spec": dataclasses.replace(SPEC, join=JoinSpec(chunks=1, chunk_frames=2))}, "join"),
        ({"vae": "another"}, "vae"),
    ],
)
def test_another_encoding_does_not_go_into_the_same_folder(dataset, whole, change, differs):
    before = (whole[0] / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=f"encoded otherwise .*{differs}"):
        run(dataset, whole[0], Counting(), **change)
    assert (whole[0] / "manifest.json").read_bytes() == before


def test_a_dataset_that_has_changed(dataset, whole, tmp_path):
    write_caption(dataset, "a", 0, "something else")
    try:
        with pytest.raises(UserError, match=r"encoded otherwise \(dataset\)"):
            run(dataset, whole[0], Counting())
    finally:
        write_caption(dataset, "a", 0, "a shot 0")


def test_folders_that_do_not_do(dataset, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="holds other files"):
        run(dataset, tmp_path, Counting())
    with pytest.raises(UserError, match="no encoded clips"):
        EncodedClips(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 9}')
    with pytest.raises(UserError, match="format 9"):
        EncodedClips(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1, "texts": []}')
    with pytest.raises(UserError, match="damaged"):
        EncodedClips(tmp_path)
    short = dataclasses.replace(SPEC, join=JoinSpec(chunks=50))
    with pytest.raises(UserError, match="none of the 5 samples can be used"):
        run(dataset, tmp_path / "new", Counting(), spec=short)


KILLED = """
import sys, time
from pathlib import Path
from tests.longlive_jax.data.clips.test_encoding import Counting, run
counting = Counting()
quick = counting.video
def slow(frames):
    time.sleep(0.3)
    return quick(frames)
counting.video = slow
print("ready", flush=True)
run(Path(sys.argv[1]), Path(sys.argv[2]), counting)
"""


def test_killed_and_resumed(dataset, whole, tmp_path, repository):
    """kill -9 while clips are being written."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(dataset), str(out)]
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
    second = Counting()
    run(dataset, out, second)
    assert len(second.videos) <= len(whole[2].videos) - 2
    equal_stores(out, whole[0])
