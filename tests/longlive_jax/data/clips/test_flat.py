"""Flat folders of clips with captions next to them or in a table. Opens no video."""

import json
import unicodedata

import pytest

from longlive_jax.data.clips.dataset import find_samples
from longlive_jax.spec import UserError


@pytest.fixture
def folder(tmp_path):
    for name in ("clip10.mp4", "clip9.mp4", "b.MOV"):
        (tmp_path / name).write_bytes(b"not a video")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    return tmp_path


def captions(samples):
    return {s.name: [shot.caption for shot in s.shots] for s in samples}


def problems(samples):
    return {s.name: s.problem for s in samples if s.problem}


def test_captions_lie_next_to_their_clips(folder):
    (folder / "clip9.txt").write_bytes(b"\xef\xbb\xbfa red ball\r\nrolls  right\r\n")
    (folder / "clip10.caption").write_text("a cup")
    (folder / "b.json").write_text(json.dumps({"caption": " a tree ", "seed": 1}))
    samples = find_samples(folder)
    assert [s.name for s in samples] == ["b.MOV", "clip9.mp4", "clip10.mp4"]
    assert captions(samples) == {
        "b.MOV": ["a tree"],
        "clip9.mp4": ["a red ball rolls right"],
        "clip10.mp4": ["a cup"],
    }
    assert [s.shots[0].file for s in samples] == [folder / s.name for s in samples]
    assert not problems(samples)


def test_every_clip_without_a_caption_has_a_reason(folder):
    (folder / "clip9.txt").write_bytes("a cat".encode("utf-16"))
    (folder / "clip10.txt").write_text(" \n")
    (folder / "c.mkv").write_bytes(b"x")
    (folder / "c.webm").write_bytes(b"x")
    reasons = problems(find_samples(folder))
    assert reasons["b.MOV"] == "has no caption; expected one of b.txt, b.caption, b.json"
    assert reasons["clip9.mp4"] == "clip9.txt is not UTF-8 text; save it as UTF-8"
    assert reasons["clip10.mp4"].startswith("clip10.txt is empty")
    assert reasons["c.mkv"] == "c.webm has the same name; rename one of them"


def test_two_caption_files_must_agree(folder):
    (folder / "b.txt").write_text("a tree")
    (folder / "b.json").write_text(json.dumps({"caption": "a tree"}))
    assert captions(find_samples(folder))["b.MOV"] == ["a tree"]
    (folder / "b.json").write_text(json.dumps({"caption": "a house"}))
    assert "b.txt and b.json differ" in problems(find_samples(folder))["b.MOV"]


@pytest.mark.parametrize("columns", [("file_name", "text"), ("video", "prompt")])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_of_captions(folder, columns, kind):
    rows = [("clip9.mp4", 'a "red" ball, rolling'), ("sub/a.mp4", "a cup"), ("b.MOV", "")]
    (folder / "sub").mkdir()
    (folder / "sub" / "a.mp4").write_bytes(b"x")
    if kind == "csv":
        quoted = [f'{name},"{text.replace(chr(34), chr(34) * 2)}"' for name, text in rows]
        text = "\r\n".join([",".join(columns), *quoted])
    else:
        text = "\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows)
    (folder / f"metadata.{kind}").write_text("\ufeff" + text, encoding="utf-8")
    samples = find_samples(folder)
    assert captions(samples)["clip9.mp4"] == ['a "red" ball, rolling']
    assert captions(samples)["sub/a.mp4"] == ["a cup"]
    reasons = problems(samples)
    assert reasons["clip10.mp4"] == f"metadata.{kind} has no row for it"
    assert any("has no text or caption or prompt" in reason for reason in reasons.values())


def test_bad_tables(folder):
    table = folder / "metadata.csv"
    table.write_text("name,text\na.mp4,a cup\n")
    with pytest.raises(UserError, match=r"has no file column.*file_name, video"):
        find_samples(folder)
    table.write_text("file_name,text\nsub\\clip9.mp4,a cup\nnone.mp4,a cup\n")
    reasons = " ".join(problems(find_samples(folder)).values())
    assert "has backslashes; write sub/clip9.mp4" in reasons and "none.mp4 is missing" in reasons
    (folder / "metadata.jsonl").write_text("{}")
    with pytest.raises(UserError, match="remove one of them"):
        find_samples(folder)


def test_mixed_layouts_are_refused(folder):
    (folder / "video" / "a").mkdir(parents=True)
    (folder / "caption").mkdir()
    with pytest.raises(UserError, match="mixes two layouts"):
        find_samples(folder)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_in_any_unicode_form(tmp_path, forms):
    video, text = (unicodedata.normalize(form, "café") for form in forms)
    flat, tree, listed = (tmp_path / name for name in ("flat", "tree", "listed"))
    for folder in (flat, tree / "video" / video, listed):
        folder.mkdir(parents=True)
        (folder / f"{video}.mp4").write_bytes(b"x")
    (flat / f"{text}.txt").write_text("a cup")
    (tree / "caption" / text).mkdir(parents=True)
    (tree / "caption" / text / f"{text}.json").write_text(json.dumps({"caption": "a cup"}))
    row = {"shots": [{"video": f"{text}.mp4", "caption": "a cup"}]}
    (listed / "manifest.jsonl").write_text("\ufeff" + json.dumps(row), encoding="utf-8")
    for folder in (flat, tree, listed):
        (sample,) = find_samples(folder)
        assert not sample.problem and not sample.remarks
        assert sample.shots[0].caption == "a cup" and sample.shots[0].file.is_file()


def test_backslashes_in_a_manifest_are_named(tmp_path):
    row = {"shots": [{"video": "clips\\a.mp4", "caption": "a cup"}]}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row))
    (sample,) = find_samples(tmp_path)
    assert "'clips\\\\a.mp4' has backslashes; write clips/a.mp4" in sample.problem
