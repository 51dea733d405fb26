"""Scripts: how they are read, what a store has of them, and their chunks."""

import json

import numpy as np
import pytest
from PIL import Image

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.data.clips.dataset import find_samples
from longlive_jax.data.clips.encoding import encode_scripts
from longlive_jax.data.clips.script_records import EncodedScript
from longlive_jax.data.clips.scripts import (
    PromptScript,
    ScriptShot,
    pictures_by_name,
    read_script_lines,
    sample_scripts,
    with_pictures,
)
from longlive_jax.data.clips.store import EncodedClips
from longlive_jax.sampling.script import Shot, ShotScript
from longlive_jax.sampling.timeline import make_timeline
from longlive_jax.spec import UserError
from tests.longlive_jax.data.clips.counting import SPEC, CountingEncoders, encode_texts
from tests.longlive_jax.data.clips.videos import numbered


def write_lines(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def test_scripts_in_json_lines(tmp_path):
    path = write_lines(
        tmp_path / "prompts.jsonl",
        {"name": "walk", "shots": [{"caption": " a cat ", "chunks": 2}], "image": "cat.png"},
        "",
        {"shots": [{"caption": "one"}, {"caption": "two", "cut": False}]},
    )
    walk, other = read_script_lines(path)
    assert walk == PromptScript("walk", (ScriptShot("a cat", 2),), tmp_path / "cat.png")
    assert other.name == "line 3" and other.image is None
    assert other.shots == (ScriptShot("one"), ScriptShot("two", cut=False))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[1]", "expected an object"),
        ({"shots": []}, 'as in {"shots": [{"caption"'),
        ({"shots": [{"text": "x"}]}, "shots[0]: unknown key 'text'"),
        ({"shots": [{"caption": " "}]}, "shots[0]: caption is missing or empty"),
        ({"shots": [{"caption": "x", "chunks": 0}]}, "chunks must be a whole number >= 1, got 0"),
        ({"shots": [{"caption": "x", "chunks": True}]}, "chunks must be a whole number"),
        ({"shots": [{"caption": "x", "cut": 1}]}, "cut must be true or false, got 1"),
        (
            {"shots": [{"caption": "x", "chunks": 1}, {"caption": "y"}]},
            "shots[1]: chunks is missing; give it for every shot, or for none",
        ),
        ({"shots": [{"caption": "x"}], "image": 3}, "image must be a path"),
        ({"shots": [{"caption": "x"}], "seed": 3}, "script: unknown key 'seed'"),
        ({"name": "good", "shots": [{"caption": "x"}]}, "'good' is already used by line 1"),
    ],
)
def test_bad_lines_have_a_problem(tmp_path, line, problem):
    good = {"name": "good", "shots": [{"caption": "x"}]}
    first, second = read_script_lines(write_lines(tmp_path / "a.jsonl", good, line))
    assert not first.problem
    assert second.problem.startswith("line 2: ") and problem in second.problem


ONE = EncodedScript(np.array([5]), np.array([9]), np.array([True]), np.array([0]))
TWO = EncodedScript(np.array([5, 6]), np.array([8, 9]), np.array([True, True]), np.array([0, 0]))
TIMED = EncodedScript(
    np.array([5, 6, 7]), np.array([8, 9, 10]), np.array([True, False, True]), np.array([1, 2, 1])
)


@pytest.mark.parametrize(
    ("script", "chunks", "per_shot", "rows", "cuts"),
    [
        (ONE, 4, 0, [5, 5, 5, 5], []),
        (ONE, 5, 2, [5, 5, 9, 5, 9], [2, 4]),
        (ONE, 2, 3, [5, 5], []),
        (TWO, 5, 0, [5, 5, 5, 9, 6], [3]),
        (TWO, 1, 0, [5], []),
        (TWO, 4, 1, [5, 9, 6, 6], [1]),
        (TIMED, 6, 0, [5, 6, 6, 10, 7, 7], [3]),
        (TIMED, 4, 3, [5, 6, 6, 10], [3]),
        (TIMED, 2, 0, [5, 6], []),
    ],
)
def test_chunks_of_a_script(script, chunks, per_shot, rows, cuts):
    prompt, cut = script.chunk_prompts(chunks, per_shot)
    assert prompt.tolist() == rows and prompt.dtype == np.int32
    assert np.flatnonzero(cut).tolist() == cuts and cut.dtype == bool


def test_chunks_equal_those_of_the_sampler(tmp_path):
    """A script in a store has the prompts and cuts that sampling it has."""
    shots = (("a red circle", 2, True), (CUT_PREFIX + "a cat", 3, True), ("a dog", 1, False))
    script = PromptScript("s", tuple(ScriptShot(*shot) for shot in shots))
    encode_scripts([script], tmp_path, spec=SPEC, encoders=CountingEncoders().encoders())
    store = EncodedClips(tmp_path)
    rows, cut = EncodedScript(**store.script(0)[0]).chunk_prompts(6)
    sampled = ShotScript(tuple(Shot(text, chunks=n, cut=cut) for text, n, cut in shots))
    timeline = make_timeline(sampled, chunk_frames=8)
    assert tuple(store.prompt(row) for row in rows) == timeline.prompts[0]
    assert cut.tolist() == timeline.cuts[0].tolist()


def test_negative_prompt_of_a_store(dataset, reference, tmp_path):
    out, encoders = tmp_path / "out", CountingEncoders()
    manifest = encode_texts(dataset, out, encoders, negative_prompt="blurry")
    assert manifest.identity["negative_prompt"] == "blurry" and "blurry" in encoders.prompts
    features = EncodedClips(out).negative_text_features
    assert (features[: 1 + len("blurry") % 5] == len("blurry")).all()
    with pytest.raises(UserError, match=r"other settings \(negative_prompt\)"):
        encode_texts(dataset, out, CountingEncoders(), negative_prompt="dull")
    empty = encode_texts(dataset, tmp_path / "empty", CountingEncoders())
    assert empty.identity["negative_prompt"] == ""
    store = EncodedClips(tmp_path / "empty")
    np.testing.assert_array_equal(store.negative_text_features, store.empty_text_features)
    with pytest.raises(UserError, match="has no negative prompt; encode the prompts into another"):
        _ = EncodedClips(reference[0]).negative_text_features


def test_first_frames_of_videos(dataset, tmp_path):
    """One frame of each video is encoded; the video of c is damaged from the beginning."""
    out, encoders = tmp_path / "out", CountingEncoders()
    manifest = encode_texts(dataset, out, encoders, first_images=True)
    assert encoders.videos == [(0,)] * 4
    assert manifest.summary() == "4 scripts, 11 prompts, 1 skipped"
    arrays, name = EncodedClips(out).script(0)
    assert name == "a" and arrays["first_frame"].shape == (2, 4, 3)
    expected = CountingEncoders().encode_video(numbered(0)[None])[0]
    np.testing.assert_array_equal(arrays["first_frame"], expected)


def test_pictures_of_a_folder(dataset, tmp_path):
    """Scripts without a picture, and with one that cannot be decoded, are skipped with a reason."""
    folder, out = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    for i, name in enumerate(("a.png", "b.JPG", "d.webp"), 3):
        Image.fromarray(numbered(i)).save(folder / name, quality=100)
    (folder / "c.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("x")
    scripts = with_pictures(sample_scripts(find_samples(dataset)), pictures_by_name(folder))
    encoders = CountingEncoders()
    options = {"spec": SPEC, "encoders": encoders.encoders(), "first_images": True}
    manifest = encode_scripts(scripts, out, **options)
    assert encoders.videos == [(3,), (4,), (5,)] and EncodedClips(out).num_scripts == 3
    skipped = dict(manifest.skipped)
    assert "has no first image; expected e.png" in skipped["e"]
    assert "c.png is not a readable image" in skipped["c"] and len(skipped) == 2
    assert encode_scripts(scripts, out, **options) == manifest and encoders.loaded["video"] == 1


def test_shards_of_scripts_are_resumed(dataset, tmp_path):
    out, first, second = tmp_path / "out", CountingEncoders(stop_after=3), CountingEncoders()
    with pytest.raises(KeyboardInterrupt):
        encode_texts(dataset, out, first, first_images=True)
    manifest = encode_texts(dataset, out, second, first_images=True)
    assert len(first.videos) == 3 and len(second.videos) == 2 and not second.prompts
    assert [shard.records for shard in manifest.scripts] == [2, 2] and manifest.complete


def test_bad_folders_of_pictures(tmp_path):
    with pytest.raises(UserError, match="no such folder of first images"):
        pictures_by_name(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no pictures"):
        pictures_by_name(tmp_path)
    for name in ("a.png", "a.jpg"):
        Image.fromarray(numbered(1)).save(tmp_path / name)
    with pytest.raises(UserError, match=r"a\.png: a\.jpg has the same name; remove one"):
        pictures_by_name(tmp_path)
    script = PromptScript("s", (ScriptShot("x"),), tmp_path / "missing.png")
    (missing,) = with_pictures([script], None)
    assert missing.problem.endswith("missing.png does not exist")
