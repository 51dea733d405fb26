"""`longlive data`: what it says of a dataset, what it encodes, and every mistake before that."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from longlive_jax.cli.app import run
from longlive_jax.data.clips import encoding
from longlive_jax.data.clips.store import EncodedClips
from tests.longlive_jax.data.clips.models import write_encoders
from tests.longlive_jax.data.clips.videos import (
    cut_short,
    write_caption,
    write_sample,
    write_video,
)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Every kind of sample: two good ones, one with a remark, and one of each trouble."""
    root = tmp_path_factory.mktemp("broken")
    write_sample(root, "good2", 40, fps=30, audio=True)
    write_sample(root, "good10", 30, 31, size=(31, 63))
    write_sample(root, "half", 32)
    write_video(root / "video" / "half" / "9.mp4", 32)
    write_sample(root, "cut", 96, options={"movflags": "faststart"})
    cut_short(root / "video" / "cut" / "0.mp4", 0.8)
    write_sample(root, "noindex", 32)
    cut_short(root / "video" / "noindex" / "0.mp4")
    write_video(root / "video" / "nocaption" / "0.mp4", 32)
    write_sample(root, "empty[1]", 32)
    write_caption(root, "empty[1]", 0, " ")
    write_sample(root, "short", 20)
    return root


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    return write_sample(write_sample(root, "a", 14), "b", 6, 9)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("tiny") / "checkpoint")


def test_check_lists_every_sample_with_its_reason(broken, capsys):
    assert run(["data", "check", str(broken)]) == 1
    said = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line for line in said.splitlines() if "│" in line}
    assert list(rows) == [
        "cut", "empty[1]", "good2", "good10", "half", "nocaption", "noindex", "short"
    ]  # fmt: skip
    for name, words in {
        "cut": "cut short or damaged",
        "empty[1]": "0.json has no caption",
        "good2": "ok",
        "good10": "ok",
        "half": "video/half/9.mp4 left out: caption/half/9.json is missing",
        "nocaption": "caption/nocaption/0.json is missing",
        "noindex": "0.mp4: cannot be decoded",
        "short": "too short: fills 0 of 1 chunks",
    }.items():
        assert words in rows[name], rows[name]
        assert ("unusable" in rows[name]) == (name not in ("good2", "good10", "half"))
    assert "31x63" in rows["good10"] and " 30 " in rows["good2"]
    assert "3 of 8 samples can be used" in said


def test_check_as_json(broken, good, capsys):
    assert run(["data", "check", str(broken), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["usable"], found["unusable"]) == (8, 3, 5)
    by_name = {one["name"]: one for one in found["findings"]}
    assert by_name["good10"]["chunks"] == 1 and by_name["good10"]["shots"] == 2
    assert by_name["half"]["remarks"] and not by_name["half"]["reason"]
    assert run(["data", "check", str(good), "--json", "--chunk=2", "--decode"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["chunks"] for one in found["findings"]] == [2, 2]
    assert all(one["usable"] and one["seconds"] > 0.5 for one in found["findings"])


def test_check_of_a_manifest(good, tmp_path, capsys):
    shot = {"video": str(good / "video" / "a" / "0.mp4"), "caption": "a"}
    path = tmp_path / "clips.jsonl"
    path.write_text(json.dumps({"shots": [shot]}) + "\n{oops\n")
    assert run(["data", "check", str(path), "--chunk=1"]) == 1
    said = capsys.readouterr().out
    assert "line 2: " in said and "1 of 2 samples can be used" in said


def test_check_without_anything_usable(broken, tmp_path, capsys):
    assert run(["data", "check", str(broken), "--chunks=9"]) == 2
    said = capsys.readouterr()
    assert "fills 1 of 9 chunks" in said.out
    assert "none of its 8 samples can be used" in said.err
    assert run(["data", "check", str(broken), "--chunks=9", "--pad"]) == 1
    assert run(["data", "check", str(tmp_path)]) == 2
    assert "no dataset; expected video/<sample>/<shot>.mp4" in capsys.readouterr().err


def test_check_of_sizes(good, tmp_path, capsys):
    """Encoding would skip what is too far from the wanted shape."""
    root = write_sample(tmp_path / "thin", "thin", 32, size=(2, 400))
    assert run(["data", "check", str(root)]) == 0
    write_sample(root, "usual", 32)
    assert run(["data", "check", str(root), "--size=32x64"]) == 1
    assert "0.mp4: 2x400 pixels are too far from the shape of 32x64" in capsys.readouterr().out
    assert run(["data", "check", str(good), "--size=1000000"]) == 2
    assert run(["data", "check", str(good), "--size=31x64"]) == 2
    assert "is not divisible by 32" in capsys.readouterr().err


HOSTILE = r"""
{"name": "good", "shots": [{"video": "a.mp4", "caption": "x"}]}
{"name": "s\ud83d", "shots": [{"video": "a.mp4", "caption": "x"}]}
{"name": "red\u001b[31m\n", "shots": [{"video": "a.mp4", "caption": "x"}]}
{"name": "zero", "shots": [{"video": "a\u0000b.mp4", "caption": "x"}]}
{"name": "half", "shots": [{"video": "a\ud83d.mp4", "caption": "x"}]}
{"name": "late", "shots": [{"video": "a.mp4", "caption": "x", "start": 1LATE}]}
{"name": "pipe", "shots": [{"video": "pipe.mp4", "caption": "x"}]}
"""


def test_check_of_hostile_names_and_numbers(tmp_path, repository):
    """In a process of its own, whose output takes UTF-8 alone; the folder's name is Latin-1."""
    root = tmp_path / os.fsdecode(b"caf\xe9")
    write_video(root / "a.mp4", 32)
    os.mkfifo(root / "pipe.mp4")
    (root / "manifest.jsonl").write_text(HOSTILE.replace("LATE", "0" * 400))
    command = [sys.executable, "-m", "longlive_jax", "data", "check", str(root)]
    env = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, cwd=repository, env=env, capture_output=True, timeout=120)
    said = done.stdout.decode()
    assert done.returncode == 1 and b"Traceback" not in done.stderr, done.stderr
    assert r"s\ud83d" in said and r"red\x1b[31m\n" in said and "3 of 7 samples can be used" in said
    for reason in ("video is no file name", "start must be seconds", "is no regular file"):
        assert reason in said


def test_encode_and_again(good, checkpoint, tmp_path, capsys):
    command = [
        "data", "encode", f"--source={good}", f"--checkpoint={checkpoint}",
        f"--out={tmp_path / 'out'}", "--chunks=2", "--text_len=16",
    ]  # fmt: skip
    assert run(command) == 0
    assert "2 clips, 4 prompts" in capsys.readouterr().out
    clips = EncodedClips(tmp_path / "out")
    assert clips[1].latents.shape == (4, 4, 2, 4) and clips[1].latents.dtype == np.float16
    assert clips[1].cut.tolist() == [False, True] and clips[1].text.shape == (2, 16, 8)
    assert run(command) == 0
    assert "2 clips" in capsys.readouterr().out
    assert run([*command, "--size=64x64"]) == 2
    assert "encoded otherwise (size)" in capsys.readouterr().err


def test_encode_of_texts_alone(good, checkpoint, tmp_path, capsys):
    command = [
        "data", "encode", f"--source={good}", f"--checkpoint={checkpoint}", "--text_len=16",
        f"--out={tmp_path / 'out'}", "--chunks=2", "--texts_only",
    ]  # fmt: skip
    for _ in range(2):
        assert run(command) == 0
        assert f"{tmp_path / 'out'}: 0 clips, 7 prompts\n" == capsys.readouterr().out
    assert EncodedClips(tmp_path / "out").empty.shape == (16, 8)


@pytest.mark.parametrize("share", ["auto", "halo"])
def test_encoded_over_a_mesh_as_by_one_device(good, checkpoint, tmp_path, share, monkeypatch):
    """Every device's frames are decoded for themselves; a clip of two shots and one with padding
    among them."""
    command = [
        "data", "encode", f"--source={good}", f"--checkpoint={checkpoint}", "--chunks=4", "--pad",
        "--text_len=16", "--dtype=float32",
    ]  # fmt: skip
    assert run([*command, f"--out={tmp_path / 'one'}"]) == 0
    parts = []
    read_clip = encoding.read_clip

    def read(sample, clip, size, part):
        parts.append((part.start, part.stop))
        return read_clip(sample, clip, size, part)

    monkeypatch.setattr(encoding, "read_clip", read)
    over = ["--mesh=sp=4", f"--share={share}"]
    assert run([*command, *over, f"--out={tmp_path / 'four'}"]) == 0
    own = [(0, 5), (5, 13), (13, 21), (21, 29)]
    assert sorted(parts) == (sorted(2 * own) if share == "auto" else sorted(2 * [(0, 29)] * 4))
    one, four = (EncodedClips(tmp_path / name) for name in ("one", "four"))
    assert len(one) == len(four) == 2
    for a, b in ((one[i], four[i]) for i in range(2)):
        np.testing.assert_allclose(b.latents, a.latents, atol=2e-5 * np.abs(a.latents).max())
        np.testing.assert_array_equal(b.mask, a.mask)
    assert one.manifest.identity == four.manifest.identity


def test_encode_names_what_it_skips_and_survives_a_full_disk(
    broken, checkpoint, tmp_path, capsys, monkeypatch
):
    command = [
        "data", "encode", f"--source={broken}", f"--checkpoint={checkpoint}",
        f"--out={tmp_path / 'out'}", "--chunks=2", "--text_len=16", "--shard=2",
    ]  # fmt: skip
    write = encoding.write_file

    def full(path, content):
        if path.name == "00000002":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(encoding, "write_file", full)
    assert run(command) == 1
    said = capsys.readouterr().err
    assert "cannot be written (No space left on device)" in said and "same command" in said
    monkeypatch.undo()
    assert run(command) == 0
    said = capsys.readouterr()
    assert "5 clips" in said.out and "3 skipped" in said.out
    assert "skipped nocaption: no shot has a caption" in said.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--source=/nowhere"], "no such dataset"),
        (["--checkpoint=/nowhere"], "no such checkpoint"),
        (["--out=/proc/nowhere"], "cannot write"),
        (["--size=64"], "not HEIGHTxWIDTH"),
        (["--size=64x40"], "not divisible by 32"),
        (["--chunks=0"], "chunks is 0"),
        (["--dtype=float8"], "'float8' is not one of"),
        (["--shard=0"], "shard is 0"),
        (["--chunks=50"], "none of the 2 samples can be used"),
        (["--sorce=x"], "did you mean '--source'"),
        (["--mesh=sp=3"], "4 latents do not split over mesh.sp = 3"),
        (["--mesh=sp=4", "--share=tails"], "1 latents a device are too few"),
        (["--mesh=sp=9"], "sp = 9, and there are 8 devices"),
        (["--mesh=data=2"], "one after the other, over sp"),
        (["--mesh=ps=2"], "unknown axis 'ps'"),
        (["--mesh=sp=2", "--texts_only"], "give one of them"),
    ],
)
def test_mistakes_cost_one_line(good, checkpoint, tmp_path, change, message, capsys, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr("longlive_jax.data.clips.encoders.load_model", loaded)
    command = [
        "data", "encode", f"--source={good}", f"--checkpoint={checkpoint}",
        f"--out={tmp_path / 'out'}", "--chunks=2",
    ]  # fmt: skip
    assert run([*command, *change]) == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("longlive")]
    assert len(lines) == 1 and message in lines[0]


def test_actions(capsys):
    assert run(["data"]) == 0 and "data check" in capsys.readouterr().out
    assert run(["data", "chekc"]) == 2
    assert "did you mean 'check'" in capsys.readouterr().err
    assert run(["data", "check", "--help"]) == 0
