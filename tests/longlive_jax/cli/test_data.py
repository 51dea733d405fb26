"""`longlive data`: reports on datasets, encoding, and mistakes that are detected before it."""

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
    """Every kind of sample: two good ones, one with a remark, and one with each problem."""
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
    output = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line for line in output.splitlines() if "│" in line}
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
    assert "3 of 8 samples can be used" in output


def test_check_as_json(broken, good, capsys):
    assert run(["data", "check", str(broken), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["samples"], report["usable"], report["unusable"]) == (8, 3, 5)
    by_name = {finding["name"]: finding for finding in report["findings"]}
    assert by_name["good10"]["chunks"] == 1 and by_name["good10"]["shots"] == 2
    assert by_name["half"]["remarks"] and not by_name["half"]["reason"]
    assert run(["data", "check", str(good), "--json", "--chunk=2", "--decode"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [finding["chunks"] for finding in findings] == [2, 2]
    assert all(finding["usable"] and finding["seconds"] > 0.5 for finding in findings)


def test_check_of_a_manifest(good, tmp_path, capsys):
    shot = {"video": str(good / "video" / "a" / "0.mp4"), "caption": "a"}
    path = tmp_path / "clips.jsonl"
    path.write_text(json.dumps({"shots": [shot]}) + "\n{oops\n")
    assert run(["data", "check", str(path), "--chunk=1"]) == 1
    output = capsys.readouterr().out
    assert "line 2: " in output and "1 of 2 samples can be used" in output


def test_check_without_anything_usable(broken, tmp_path, capsys):
    assert run(["data", "check", str(broken), "--chunks=9"]) == 2
    output = capsys.readouterr()
    assert "fills 1 of 9 chunks" in output.out
    assert "none of its 8 samples can be used" in output.err
    assert run(["data", "check", str(broken), "--chunks=9", "--pad"]) == 1
    assert run(["data", "check", str(tmp_path)]) == 2
    assert "not a dataset; expected video/<sample>/<shot>.mp4" in capsys.readouterr().err


def test_check_of_sizes(good, tmp_path, capsys):
    """Samples with an extreme aspect ratio, which encoding would skip, are unusable."""
    root = write_sample(tmp_path / "thin", "thin", 32, size=(2, 400))
    assert run(["data", "check", str(root)]) == 0
    write_sample(root, "usual", 32)
    assert run(["data", "check", str(root), "--size=32x64"]) == 1
    assert "0.mp4: the shape of 2x400 pixels is too far from 32x64" in capsys.readouterr().out
    assert run(["data", "check", str(good), "--size=1000000"]) == 2
    assert run(["data", "check", str(good), "--size=31x64"]) == 2
    assert "divisible by 32" in capsys.readouterr().err


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
    """Run in a process whose output is strict UTF-8; the folder's name is Latin-1."""
    root = tmp_path / os.fsdecode(b"caf\xe9")
    write_video(root / "a.mp4", 32)
    os.mkfifo(root / "pipe.mp4")
    (root / "manifest.jsonl").write_text(HOSTILE.replace("LATE", "0" * 400))
    command = [sys.executable, "-m", "longlive_jax", "data", "check", str(root)]
    env = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, cwd=repository, env=env, capture_output=True, timeout=120)
    output = done.stdout.decode()
    assert done.returncode == 1 and b"Traceback" not in done.stderr, done.stderr
    assert r"s\ud83d" in output and r"red\x1b[31m\n" in output
    assert "3 of 7 samples can be used" in output
    for reason in ("video is not a file name", "start must be seconds", "is not a regular file"):
        assert reason in output


def test_encoding_twice(good, checkpoint, tmp_path, capsys):
    command = [
        "data", "encode", f"--source={good}", f"--checkpoint={checkpoint}",
        f"--out={tmp_path / 'out'}", "--chunks=2", "--text_len=16",
    ]  # fmt: skip
    assert run(command) == 0
    assert "2 clips, 4 prompts" in capsys.readouterr().out
    clips = EncodedClips(tmp_path / "out")
    assert clips[1].latents.shape == (4, 4, 2, 4) and clips[1].latents.dtype == np.float16
    assert clips[1].cut.tolist() == [False, True] and clips[1].text_features.shape == (2, 16, 8)
    assert run(command) == 0
    assert "2 clips" in capsys.readouterr().out
    assert run([*command, "--size=64x64"]) == 2
    assert "encoded with other settings (size)" in capsys.readouterr().err


def test_encode_of_prompts_alone(good, checkpoint, tmp_path, capsys):
    command = [
        "data", "encode", f"--source={good}", f"--checkpoint={checkpoint}", "--text_len=16",
        f"--out={tmp_path / 'out'}", "--chunks=2", "--texts_only",
    ]  # fmt: skip
    for _ in range(2):
        assert run(command) == 0
        assert f"{tmp_path / 'out'}: 2 scripts, 7 prompts\n" == capsys.readouterr().out
    assert EncodedClips(tmp_path / "out").empty_text_features.shape == (16, 8)


@pytest.mark.parametrize("option", ["--vae_parallel=auto", "--vae_parallel=halo", "--share=halo"])
def test_encoding_over_a_mesh_equals_one_device(good, checkpoint, tmp_path, option, monkeypatch):
    """Each device's frames are decoded separately, for a clip of two shots and a padded one."""
    command = [
        "data", "encode", f"--source={good}", f"--checkpoint={checkpoint}", "--chunks=4", "--pad",
        "--text_len=16", "--dtype=float32",
    ]  # fmt: skip
    assert run([*command, f"--out={tmp_path / 'one'}"]) == 0
    ranges = []
    read_clip = encoding.read_clip

    def record_range(sample, clip, size, part):
        ranges.append((part.start, part.stop))
        return read_clip(sample, clip, size, part)

    monkeypatch.setattr(encoding, "read_clip", record_range)
    assert run([*command, "--mesh=sp=4", option, f"--out={tmp_path / 'four'}"]) == 0
    shards = [(0, 5), (5, 13), (13, 21), (21, 29)]
    halos = [(0, 29)] * 4
    assert sorted(ranges) == sorted(2 * (shards if option.endswith("auto") else halos))
    single, sharded = (EncodedClips(tmp_path / name) for name in ("one", "four"))
    assert len(single) == len(sharded) == 2
    for a, b in ((single[i], sharded[i]) for i in range(2)):
        np.testing.assert_allclose(b.latents, a.latents, atol=2e-5 * np.abs(a.latents).max())
        np.testing.assert_array_equal(b.mask, a.mask)
    assert single.manifest.identity == sharded.manifest.identity


def test_former_name_of_vae_parallel_is_hidden(capsys):
    assert run(["data", "encode", "--help"]) == 0
    output = capsys.readouterr().out
    assert "--vae_parallel" in output and "--share" not in output
    assert run(["data", "encode", "--shar=auto", "--source=a", "--checkpoint=b", "--out=c"]) == 2
    assert "did you mean '--shard'" in capsys.readouterr().err


def test_encode_names_skipped_samples_and_resumes_after_a_full_disk(
    broken, checkpoint, tmp_path, capsys, monkeypatch
):
    command = [
        "data", "encode", f"--source={broken}", f"--checkpoint={checkpoint}",
        f"--out={tmp_path / 'out'}", "--chunks=2", "--text_len=16", "--shard=2",
    ]  # fmt: skip
    write = encoding.write_file

    def write_until_full(path, content):
        if path.name == "00000002":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(encoding, "write_file", write_until_full)
    assert run(command) == 1
    error = capsys.readouterr().err
    assert "cannot be written (No space left on device)" in error and "same command" in error
    monkeypatch.undo()
    assert run(command) == 0
    output = capsys.readouterr()
    assert "5 clips" in output.out and "3 skipped" in output.out
    assert "skipped nocaption: no shot has a caption" in output.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--source=/nowhere"], "no such dataset"),
        (["--checkpoint=/nowhere"], "checkpoint '/nowhere' is not a directory"),
        (["--out=/proc/nowhere"], "cannot write"),
        (["--size=64"], "must be HEIGHTxWIDTH"),
        (["--size=64x40"], "divisible by 32"),
        (["--chunks=0"], "chunks must be >= 1, got 0"),
        (["--dtype=float8"], "'float8' is not one of"),
        (["--shard=0"], "shard must be >= 1, got 0"),
        (["--chunks=50"], "none of the 2 samples can be used"),
        (["--sorce=x"], "did you mean '--source'"),
        (["--mesh=sp=3"], "4 latents do not split over mesh.sp = 3"),
        (["--mesh=sp=4", "--vae_parallel=tails"], "1 latents per device are too few"),
        (["--mesh=sp=9"], "sp must be <= 8, the number of devices, got 9"),
        (["--mesh=data=2"], "data and fsdp must be 1"),
        (["--mesh=ps=2"], "unknown axis 'ps'"),
        (["--mesh=sp=2", "--texts_only"], "remove one of them"),
    ],
)
def test_mistakes_print_one_line_and_load_nothing(
    good, checkpoint, tmp_path, change, message, capsys, monkeypatch
):
    def load_model(*_, **__):
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr("longlive_jax.data.clips.encoders.load_model", load_model)
    command = [
        "data", "encode", f"--source={good}", f"--checkpoint={checkpoint}",
        f"--out={tmp_path / 'out'}", "--chunks=2",
    ]  # fmt: skip
    assert run([*command, *change]) == 2
    errors = capsys.readouterr().err.splitlines()
    lines = [line for line in errors if line.startswith("longlive")]
    assert len(lines) == 1 and message in lines[0]


def test_actions(capsys):
    assert run(["data"]) == 0 and "data check" in capsys.readouterr().out
    assert run(["data", "chekc"]) == 2
    assert "did you mean 'check'" in capsys.readouterr().err
    assert run(["data", "check", "--help"]) == 0
