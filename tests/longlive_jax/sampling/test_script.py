"""Shot scripts in every layout, and the errors of invalid ones."""

import json

import numpy as np
import pytest
from PIL import Image

from longlive_jax.sampling.script import Shot, ShotScript, check_size, parse_script, read_scripts
from longlive_jax.spec import UserError

YAML = """
shots:
  - {prompt: a red circle, seconds: 4}
  - {prompt: a blue square, chunks: 3}
  - {prompt: it falls, seconds: 2.5, cut: false}
seed: 7
size: [64, 96]
image: first.png
negative_prompt: blurry
"""


def captions(folder, texts, durations=None):
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(json.dumps({"caption": text}))
    if durations is not None:
        (folder / "shot_durations.txt").write_text(durations)


def test_yaml_and_json_are_equivalent(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "first.png")
    (tmp_path / "a.yaml").write_text(YAML)
    script = ShotScript.read(tmp_path / "a.yaml")
    assert script.shots == (
        Shot("a red circle", seconds=4.0),
        Shot("a blue square", chunks=3),
        Shot("it falls", seconds=2.5, cut=False),
    )
    assert (script.seed, script.size, script.negative_prompt) == (7, (64, 96), "blurry")
    assert script.image == str(tmp_path / "first.png") and script.name == "a"
    values = {
        "shots": [{"prompt": s.prompt, "seconds": s.seconds, "chunks": s.chunks, "cut": s.cut}
                  for s in script.shots],
        "seed": 7, "size": "64x96", "image": "first.png", "negative_prompt": "blurry",
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(values))
    assert ShotScript.read(tmp_path / "a.json") == script


SHOTS = [{"prompt": "a", "seconds": 1}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shots": []}, "no shots"),
        ({}, "no shots"),
        ([1], "expected 'shots: "),
        ({"shots": "a"}, "must be a list"),
        ({"shots": SHOTS, "seeds": 1}, "unknown key 'seeds'; did you mean 'seed'"),
        ({"shots": [{"promt": "a", "seconds": 1}]}, r"shots\[0\].*'promt'; did you mean 'prompt'"),
        ({"shots": [{"prompt": "a"}]}, "either seconds or chunks"),
        ({"shots": [{"prompt": "a", "seconds": 1, "chunks": 1}]}, "either seconds or chunks"),
        ({"shots": [{"prompt": "a", "seconds": 0}]}, "seconds must be positive, got 0"),
        ({"shots": [{"prompt": "a", "seconds": -2}]}, "must be positive, got -2"),
        (
            {"shots": [{"prompt": "a", "seconds": float("nan")}]},
            "expected a finite number, got nan",
        ),
        ({"shots": [{"prompt": "a", "chunks": 0}]}, "chunks must be positive, got 0"),
        ({"shots": [{"prompt": "a", "chunks": 1.5}]}, "chunks: expected int"),
        ({"shots": [{"prompt": "a", "seconds": "4"}]}, "seconds: expected float"),
        ({"shots": [{"prompt": " ", "seconds": 4}]}, "needs a prompt"),
        ({"shots": ["a"]}, r"shots\[0\] must be {prompt: TEXT, seconds: NUMBER}, got 'a'"),
        ({"shots": "a cat"}, "shots must be a list of {prompt: TEXT, seconds: NUMBER}"),
        ("a cat", r"expected 'shots: \[...\]', a list of {prompt: TEXT, seconds: NUMBER}, got str"),
        (
            {"shots": [{"prompt": "a cat " * 20, "seconds": 0}]},
            "'(a cat ){9}a c[.]{3}': seconds must be positive",
        ),
        ({"shots": SHOTS, "seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
        ({"shots": SHOTS, "size": [60, 100]}, "nearest: 32x96, 32x128, 64x96, 64x128"),
        ({"shots": SHOTS, "size": [64]}, "expected 2 values"),
        ({"shots": SHOTS, "size": "wide"}, "size must be HEIGHTxWIDTH, such as"),
        ({"shots": SHOTS, "image": "none.png"}, "does not exist"),
    ],
)
def test_invalid_scripts_are_explained(values, message, tmp_path):
    with pytest.raises(UserError, match=message):
        parse_script(values, folder=tmp_path)


def test_files_that_are_not_scripts(tmp_path):
    for name, text, words in [
        ("a.yaml", "shots: [", "not valid yaml"),
        ("a.json", "{", "not valid json"),
        ("a.mp4", "", "ends in .yaml"),
        ("a.txt", "\n", "no caption"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=words) as caught:
            read_scripts(tmp_path / name, chunks=1)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no script at"):
        read_scripts(tmp_path / "missing.yaml")


def test_an_image_must_be_readable(tmp_path):
    (tmp_path / "fake.png").write_text("not a picture")
    with pytest.raises(UserError, match=r"fake\.png is .*readable image"):
        ShotScript.of("a", seconds=1, image=str(tmp_path / "fake.png"))
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:4000])
    with pytest.raises(UserError, match="readable image"):
        ShotScript.of("a", seconds=1, image=str(tmp_path / "cut.png"))


def test_sizes():
    check_size(704, 1280)
    with pytest.raises(UserError, match="704x1280"):
        check_size(720, 1280)
    with pytest.raises(UserError, match="32x32"):
        check_size(0, -5)


def test_a_text_file_has_one_video_per_line(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    scripts = read_scripts(tmp_path / "p.txt", chunks=3)
    assert [s.shots for s in scripts] == [(Shot("one", chunks=3),), (Shot("two", chunks=3),)]
    with pytest.raises(UserError, match="give chunks, such as --chunks=6"):
        read_scripts(tmp_path / "p.txt")


def test_a_caption_folder_has_ordered_shots_and_durations(tmp_path):
    texts = {"10": "ten", "2": "two", "intro": "in", "global": "ignored"}
    captions(tmp_path / "caption" / "b", texts, "2, 1 3\n")
    captions(tmp_path / "caption" / "a", {"0": "only"}, "4")
    a, b = read_scripts(tmp_path)
    assert (a.name, b.name) == ("a", "b") and a.shots == (Shot("only", chunks=4),)
    assert b.shots == (Shot("in", chunks=2), Shot("two", chunks=1), Shot("ten", chunks=3))
    assert ShotScript.read(tmp_path / "caption" / "b") == b


@pytest.mark.parametrize(
    ("durations", "options", "expected"),
    [
        (None, {"chunks": 8}, [3, 3, 2]),
        (None, {"chunks": 2}, [1, 1]),
        (None, {"chunks_per_shot": 2}, [2, 2, 2]),
        (None, {"chunks_per_shot": 2, "chunks": 5}, [2, 2, 1]),
        ("1,2,3", {"chunks_per_shot": 9}, [1, 2, 3]),
        ("1,2,3", {"chunks": 9}, [1, 2, 6]),
        ("1,2,3", {"chunks": 2}, [1, 1]),
        ("4", {"chunks": 6}, [6]),
    ],
)
def test_durations_are_truncated_or_the_last_shot_is_extended(
    tmp_path, durations, options, expected
):
    captions(tmp_path / "v", {"0": "a", "1": "b", "2": "c"}, durations)
    script = ShotScript.read(tmp_path / "v", **options)
    assert [s.chunks for s in script.shots] == expected
    assert bool(script.notes) == (len(expected) < 3)


@pytest.mark.parametrize(
    ("durations", "words"),
    [
        ("1 2", "2 durations for 1"),
        ("0", "expected positive integers"),
        ("x", "expected positive integers"),
        (None, "give chunks, such as --chunks=6"),
    ],
)
def test_invalid_durations(tmp_path, durations, words):
    captions(tmp_path / "v", {"0": "a"}, durations)
    with pytest.raises(UserError, match=words):
        read_scripts(tmp_path / "v")


def test_folders_without_captions(tmp_path):
    with pytest.raises(UserError, match="no caption files"):
        read_scripts(tmp_path)
    (tmp_path / "0.json").write_text('{"text": "a"}')
    with pytest.raises(UserError, match="expected"):
        read_scripts(tmp_path, chunks=1)
