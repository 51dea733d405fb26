"""`longlive data encode` of scripts without videos, and of first images."""

import json

import numpy as np
import pytest
from PIL import Image

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.cli.app import run
from longlive_jax.data.clips.script_records import EncodedScript
from longlive_jax.data.clips.store import EncodedClips
from tests.longlive_jax.data.clips.models import write_encoders
from tests.longlive_jax.data.clips.videos import numbered, write_sample

LINES = """
{"name": "two", "shots": [{"caption": "a cat", "chunks": 2}, {"caption": "a dog", "chunks": 1}]}
{"name": "one", "shots": [{"caption": "a cat"}]}
"""
SCRIPT = "shots:\n- {prompt: a cat, seconds: 0.6}\n- {prompt: a dog, chunks: 1}\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture
def encode(checkpoint, tmp_path):
    """Runs `data encode` into a new folder and returns its exit code."""

    def run_encode(*options, out="out"):
        command = ["data", "encode", f"--checkpoint={checkpoint}", f"--out={tmp_path / out}"]
        return run([*command, "--text_len=16", *options])

    return run_encode


def chunks(folder, index, count, per_shot=0):
    """Prompts of the chunks of a script in a store."""
    store = EncodedClips(folder)
    rows, _ = EncodedScript(**store.script(index)[0]).chunk_prompts(count, per_shot)
    return [store.prompt(row) for row in rows]


def test_scripts_in_json_lines(encode, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(LINES)
    assert encode(f"--scripts={tmp_path / 'a.jsonl'}", "--negative_prompt=dull") == 0
    assert "out: 2 scripts, 6 prompts" in capsys.readouterr().out
    assert chunks(tmp_path / "out", 0, 3) == ["a cat", "a cat", CUT_PREFIX + "a dog"]
    assert chunks(tmp_path / "out", 1, 3, 2) == ["a cat", "a cat", CUT_PREFIX + "a cat"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["identity"]["negative_prompt"] == "dull"
    assert EncodedClips(tmp_path / "out").negative_text_features.shape == (16, 8)


def test_other_kinds_of_scripts(encode, tmp_path):
    """Chunks have 8 frames, and a second 24; lines of text have no durations."""
    (tmp_path / "a.yaml").write_text(SCRIPT)
    assert encode(f"--scripts={tmp_path / 'a.yaml'}", out="yaml") == 0
    assert chunks(tmp_path / "yaml", 0, 3) == ["a cat", "a cat", CUT_PREFIX + "a dog"]
    (tmp_path / "a.txt").write_text("a cat\na dog\n")
    assert encode(f"--scripts={tmp_path / 'a.txt'}", out="text") == 0
    assert chunks(tmp_path / "text", 1, 2, 1) == ["a dog", CUT_PREFIX + "a dog"]
    for name in ("one", "two"):
        folder = tmp_path / "captions" / "caption" / name
        folder.mkdir(parents=True)
        for i, text in enumerate(("a cat", "a dog")):
            (folder / f"{i}.json").write_text(json.dumps({"caption": text}))
    (folder / "shot_durations.txt").write_text("1 2")
    assert encode(f"--scripts={tmp_path / 'captions'}", out="folder") == 0
    assert chunks(tmp_path / "folder", 0, 4) == ["a cat", "a cat", CUT_PREFIX + "a dog", "a dog"]
    assert chunks(tmp_path / "folder", 1, 3) == ["a cat", CUT_PREFIX + "a dog", "a dog"]


def test_first_frames_equal_the_first_latents_of_clips(encode, tmp_path, capsys):
    root = write_sample(tmp_path / "videos", "a", 14)
    options = [f"--source={root}", "--chunks=2", "--dtype=float32"]
    assert encode(*options, out="clips") == 0
    assert encode(*options, "--texts_only", "--first_images=own") == 0
    assert "1 scripts, 3 prompts" in capsys.readouterr().out
    frame = EncodedClips(tmp_path / "out").script(0)[0]["first_frame"]
    latents = EncodedClips(tmp_path / "clips")[0].latents
    np.testing.assert_allclose(frame, latents[0], atol=2e-5 * np.abs(latents).max())


def test_images_of_scripts(encode, tmp_path, capsys):
    Image.fromarray(numbered(1, 64, 32)).save(tmp_path / "cat.png")
    (tmp_path / "a.yaml").write_text(SCRIPT + "image: cat.png\n")
    assert encode(f"--scripts={tmp_path / 'a.yaml'}", "--first_images=own", out="yaml") == 0
    lines = LINES.strip().split("\n")
    first = json.loads(lines[0]) | {"image": "cat.png"}
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(first), lines[1]]))
    assert encode(f"--scripts={tmp_path / 'a.jsonl'}", "--first_images=own", out="lines") == 0
    output = capsys.readouterr()
    assert "1 scripts, 5 prompts, 1 skipped" in output.out
    assert "skipped one: has no first image" in output.err
    frames = [
        EncodedClips(tmp_path / name).script(0)[0]["first_frame"] for name in ("yaml", "lines")
    ]
    np.testing.assert_array_equal(*frames)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --source=DATASET, or --scripts=FILE"),
        (["--source=x", "--scripts=y"], "give either --source=DATASET, or --scripts=FILE"),
        (["--source=x", "--negative_prompt=dull"], "--negative_prompt belongs to scripts"),
        (["--source=x", "--first_images=own"], "--first_images belongs to scripts"),
        (["--scripts=/nowhere.jsonl"], "no scripts at /nowhere.jsonl; check the path"),
        (["--scripts=/nowhere.yaml"], "no script at /nowhere.yaml; check the path"),
        (["--scripts=FILE", "--first_images=/nowhere"], "no such folder of first images"),
        (["--scripts=FILE", "--first_images=own"], "none of the 2 samples can be used"),
        (["--scripts=FILE", "--mesh=sp=2"], "--texts_only and --scripts encode none"),
    ],
)
def test_mistakes_print_one_line_and_load_nothing(
    encode, tmp_path, options, message, capsys, monkeypatch
):
    def load_model(*_, **__):
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr("longlive_jax.data.clips.encoders.load_model", load_model)
    (tmp_path / "a.jsonl").write_text(LINES)
    file = f"--scripts={tmp_path / 'a.jsonl'}"
    assert encode(*(file if option == "--scripts=FILE" else option for option in options)) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("longlive")]
    assert len(lines) == 1 and message in lines[0]
