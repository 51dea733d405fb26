"""Records: their contents, the tags of videos, and a script made of them."""

import dataclasses
import json

import av
import numpy as np
import pytest
from PIL import Image

import longlive_jax
from longlive_jax.cli.app import run
from longlive_jax.sampling.record import (
    GENERATED_MARK,
    differences,
    file_tags,
    read_record,
    recorded_settings,
    run_record,
    video_record,
)
from longlive_jax.sampling.script import Shot, ShotScript, read_scripts
from longlive_jax.sampling.settings import SampleSpec
from longlive_jax.spec import UserError
from tests.tiny import write_tiny

SCRIPT = """
shots:
  - {prompt: a cat runs, chunks: 1}
  - {prompt: a dog sleeps, seconds: 0.3}
seed: 3
size: [64, 32]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def sampled(checkpoint, tmp_path_factory):
    """Folder of a video of two shots with other settings than the checkpoint's."""
    folder = tmp_path_factory.mktemp("sampled")
    (folder / "shots.yaml").write_text(SCRIPT)
    flags = ["--config.sample.steps=1", "--format=mp4,gif,webm,png", "--latents"]
    command = ["sample", f"--script={folder / 'shots.yaml'}", f"--checkpoint={checkpoint}"]
    assert run([*command, f"--out={folder / 'out'}", *flags]) == 0
    return folder / "out"


def test_a_record_has_everything_that_the_video_depends_on(sampled, checkpoint):
    record = json.loads((sampled / "video.json").read_text())
    assert record["generated"] is True and record["interrupted"] is False
    assert record["script"] == {
        "shots": [
            {"prompt": "a cat runs", "chunks": 1},
            {"prompt": "a dog sleeps", "seconds": 0.3},
        ],
        "seed": 3,
        "size": [64, 32],
        "name": "shots",
    }
    assert record["settings"]["steps"] == 1 and record["settings"]["chunk_frames"] == 2
    assert record["checkpoint"]["path"] == str(checkpoint.resolve())
    assert len(record["checkpoint"]["fingerprint"]) == 8
    assert record["versions"]["longlive_jax"] == longlive_jax.__version__
    assert record["versions"]["jax"] and record["device"]["platform"] == "cpu"
    assert record["command"][:2] == ["longlive", "sample"]
    assert record["video"]["frames"] == 13 and record["video"]["size"] == [384, 192]
    assert record["video"]["shots"] == [
        {"prompt": "a cat runs", "cut": False, "first_frame": 0, "end_frame": 5},
        {"prompt": "a dog sleeps", "cut": True, "first_frame": 5, "end_frame": 13},
    ]


def test_every_format_says_that_it_is_generated(sampled):
    for name in ("video.mp4", "video.webm"):
        with av.open(str(sampled / name)) as file:
            tags = {key.lower(): value for key, value in file.metadata.items()}
        assert tags["description"] == GENERATED_MARK and "AI-generated" in GENERATED_MARK
        assert json.loads(tags["comment"])["script"]["seed"] == 3
        assert tags["title"] == "shots"
    assert GENERATED_MARK.encode() in (sampled / "video.gif").read_bytes()
    with Image.open(sampled / "video.frames" / "000012.png") as image:
        assert image.text["Description"] == GENERATED_MARK


def test_tags_name_no_folder_and_no_command(sampled):
    with av.open(str(sampled / "video.mp4")) as file:
        comment = file.metadata["comment"]
    assert str(sampled.parent) not in comment and "command" not in comment
    assert json.loads(comment)["source"] == "shots.yaml"


def test_a_record_samples_the_same_video(sampled, tmp_path, capsys):
    """With its seed, size, settings and checkpoint, and no options."""
    flags = [f"--out={tmp_path}", "--latents"]
    assert run(["sample", f"--script={sampled / 'video.json'}", *flags]) == 0
    again, first = (np.load(x / "video.latents.npy") for x in (tmp_path, sampled))
    np.testing.assert_array_equal(again, first)
    assert "in the record" not in capsys.readouterr().err


def test_what_differs_from_the_record_is_a_note(sampled, tmp_path, capsys):
    flags = [f"--out={tmp_path}", "--config.sample.steps=2", "--seed=4"]
    assert run(["sample", f"--script={sampled / 'video.json'}", *flags]) == 0
    assert "note: setting steps is 2, was 1 in the record" in capsys.readouterr().err
    assert json.loads((tmp_path / "video.json").read_text())["script"]["seed"] == 4


def test_a_stated_checkpoint_replaces_that_of_the_record(sampled, tmp_path, capsys):
    flags = [f"--out={tmp_path}", "--config.checkpoint=elsewhere"]
    assert run(["sample", f"--script={sampled / 'video.json'}", *flags]) == 2
    assert "checkpoint 'elsewhere' is not a directory" in capsys.readouterr().err


def test_another_checkpoint_is_a_note(checkpoint):
    run_now = run_record(SampleSpec(), checkpoint)
    before = run_now | {"checkpoint": {"path": "elsewhere", "fingerprint": "0" * 8}}
    (line,) = differences(before, run_now)
    assert line.startswith("checkpoint fingerprint is") and line.endswith("in the record")


def test_records_are_scripts_and_other_files_are_no_records(tmp_path, checkpoint):
    script = ShotScript(
        (Shot("a", chunks=2), Shot("b", seconds=1.0, cut=False)), seed=5, negative_prompt=""
    )
    record = video_record(run_record(SampleSpec(steps=7), checkpoint), script, (64, 32))
    path = tmp_path / "a.json"
    path.write_text(json.dumps(record))
    (read,) = read_scripts(path)
    assert read == dataclasses.replace(script, size=(64, 32), name="a")
    assert recorded_settings(read_record(path))["steps"] == 7
    path.write_text(json.dumps(record["script"]))
    assert read_record(path) is None and read_record(tmp_path / "b.json") is None
    assert file_tags(record)["title"] == "a"
    path.write_text(json.dumps(record | {"settings": "many"}))
    with pytest.raises(UserError, match=r"a\.json: settings must be a JSON object, got 'many'"):
        read_record(path)
