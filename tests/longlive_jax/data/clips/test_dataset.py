"""Listing datasets: samples, and the reasons why some cannot be used. Opens no video."""

import errno
import json
import os
from pathlib import Path

import pytest

from longlive_jax.data.clips.dataset import find_samples, usable
from longlive_jax.spec import UserError
from tests.longlive_jax.data.clips.videos import write_caption


@pytest.fixture
def root(tmp_path):
    """A function that adds samples to a folder. Their files are not videos, so must stay closed."""

    def add(sample, *files, captions=()):
        for file in files:
            path = tmp_path / "video" / sample / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"not a video")
        for shot in captions:
            write_caption(tmp_path, sample, shot, f" {sample} {shot}\n")

    add.root = tmp_path
    return add


def test_samples_and_shots_are_sorted_by_number(root):
    for name in ("s10", "s9", "a"):
        root(name, "10.mp4", "2.MKV", "b.webm", "a.mov", captions=("10", "2", "a", "b"))
    (root.root / "video" / "a" / ".hidden.mp4").write_bytes(b"")
    (root.root / "video" / "notes.txt").write_text("")
    samples = find_samples(root.root)
    assert [s.name for s in samples] == ["a", "s9", "s10"]
    for sample in samples:
        assert [shot.file.name for shot in sample.shots] == ["2.MKV", "10.mp4", "a.mov", "b.webm"]
        assert sample.shots[0].caption == f"{sample.name} 2"
        assert not sample.problem and not sample.remarks
    assert usable(samples, "here") == samples


def test_shot_without_a_caption_is_left_out_with_a_remark(root):
    root("a", "1.mp4", "2.mp4", "3.mp4", "4.mp4", captions=("1", "2"))
    write_caption(root.root, "a", 2, "  ")
    (root.root / "caption" / "a" / "4.json").write_text("{")
    (sample,) = find_samples(root.root)
    assert [shot.file.name for shot in sample.shots] == ["1.mp4"] and not sample.problem
    remarks = dict(remark.split(" left out: ") for remark in sample.remarks)
    assert "has no caption" in remarks["video/a/2.mp4"]
    assert remarks["video/a/3.mp4"] == "caption/a/3.json is missing"
    assert "not valid JSON" in remarks["video/a/4.mp4"]


def test_shot_name_too_long_for_a_caption_file_is_left_out(root):
    root("a", f"{'b' * 251}.mp4", "1.mp4", captions=("1",))
    (sample,) = find_samples(root.root)
    assert not sample.problem and "cannot be read (File name too long)" in sample.remarks[0]


def test_folders_without_read_permission(root, monkeypatch):
    for name in ("a", "b"):
        root(name, "1.mp4", captions=("1",))
    unreadable = set[Path]()

    def guard(call, folder_of):
        def guarded(path, *args, **more):
            if folder_of(Path(path)) in unreadable:
                raise PermissionError(errno.EACCES, "Permission denied")
            return call(path, *args, **more)

        return guarded

    monkeypatch.setattr(Path, "iterdir", guard(Path.iterdir, lambda path: path))
    for owner, name in ((Path, "read_text"), (os, "stat")):
        monkeypatch.setattr(owner, name, guard(getattr(owner, name), lambda path: path.parent))
    unreadable |= {root.root / "video" / "a", root.root / "caption" / "b"}
    problems = {s.name: s.problem for s in find_samples(root.root)}
    assert problems["a"] == "video/a cannot be read (Permission denied)"
    assert "caption/b/1.json cannot be read (Permission denied)" in problems["b"]
    unreadable.add(root.root / "video")
    with pytest.raises(UserError, match=r"video: cannot be read \(Permission denied\)"):
        find_samples(root.root)


def test_reasons_of_unusable_folders(root):
    root("none", "1.mp4")
    root("other", "readme.txt", captions=("1",))
    root("words", captions=("1",))
    root("twice", "1.mp4", "1.mkv", captions=("1",))
    root("list", "1.mp4", captions=("1",))
    (root.root / "caption" / "list" / "1.json").write_text('["caption"]')
    problems = {s.name: s.problem for s in find_samples(root.root)}
    assert "caption/none/1.json is missing" in problems["none"]
    assert "no video file" in problems["other"] and "no video file" in problems["words"]
    assert "1.mp4: another file has the same shot number" in problems["twice"]
    assert "expected" in problems["list"]
    with pytest.raises(UserError, match="none of its 5 samples"):
        usable(find_samples(root.root), root.root)


def test_misplaced_entries_of_video_are_reported(root):
    root("a", "1.mp4", captions=("1",))
    video = root.root / "video"
    (video / "1.mp4").write_bytes(b"not a video")
    (video / "loop").symlink_to("loop")
    (video / "dead").symlink_to("nowhere")
    (video / "linked").symlink_to("a")
    (root.root / "caption" / "loop").mkdir()
    (root.root / "caption" / "linked").symlink_to("a")
    (video / "notes.txt").write_text("")
    problems = {s.name: s.problem for s in find_samples(root.root)}
    assert list(problems) == ["1.mp4", "a", "dead", "linked", "loop"]
    assert problems["1.mp4"] == (
        "video/1.mp4 is not in a sample folder; move it to video/<sample>/1.mp4"
    )
    assert problems["loop"] == "video/loop is a broken link"
    assert problems["dead"] == "video/dead is a broken link"
    assert not problems["a"] and not problems["linked"]


def test_caption_that_is_a_pipe_is_not_opened(root):
    root("a", "1.mp4")
    (root.root / "caption" / "a").mkdir(parents=True)
    os.mkfifo(root.root / "caption" / "a" / "1.json")
    (sample,) = find_samples(root.root)
    assert "caption/a/1.json is not a regular file" in sample.problem


def test_folders_that_are_not_datasets(tmp_path):
    with pytest.raises(UserError, match="no such dataset"):
        find_samples(tmp_path / "nowhere")
    with pytest.raises(UserError, match="expected video/<sample>"):
        find_samples(tmp_path)
    (tmp_path / "video").mkdir()
    with pytest.raises(UserError, match="has no samples"):
        find_samples(tmp_path)


def test_manifest(tmp_path):
    lines = [
        {"name": "b", "shots": [{"video": "x.mp4", "caption": " one "}]},
        {"shots": [{"video": "/abs/y.mp4", "caption": "two", "start": 1.5, "end": 4}] * 2},
    ]
    path = tmp_path / "manifest.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    for where in (path, tmp_path):
        named, line = find_samples(where)
        assert (named.name, line.name) == ("b", "line 3")
        (shot,) = named.shots
        assert shot.file == tmp_path / "x.mp4" and shot.caption == "one" and shot.end is None
        assert [(s.start, s.end, str(s.file)) for s in line.shots] == [(1.5, 4, "/abs/y.mp4")] * 2


SHOT = {"video": "x.mp4", "caption": "one"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 1: "),
        ("[1]", "expected an object"),
        ("{}", "at least one shot"),
        ({"shots": []}, "at least one shot"),
        ({"shot": [SHOT]}, "did you mean 'shots'"),
        ({"shots": [SHOT], "name": 3}, "name must be a string"),
        ({"shots": ["x.mp4"]}, "expected an object"),
        ({"shots": [{"video": "x.mp4"}]}, "shots[0]: caption is missing"),
        ({"shots": [SHOT, {"video": "", "caption": "b"}]}, "shots[1]: video is missing"),
        ({"shots": [SHOT | {"captoin": "b"}]}, "did you mean 'caption'"),
        ({"shots": [SHOT | {"start": -1}]}, "start must be seconds >= 0"),
        ({"shots": [SHOT | {"end": "3"}]}, "end must be seconds >= 0"),
        ({"shots": [SHOT | {"start": 3, "end": 3}]}, "end must be > start = 3, got 3"),
        (
            '{"shots": [{"video": "x", "caption": "y", "end": Infinity}]}',
            "end must be seconds >= 0",
        ),
        ({"shots": [SHOT | {"start": 10**400}]}, "start must be seconds >= 0"),
        ({"shots": [SHOT | {"end": -(10**400)}]}, "end must be seconds >= 0"),
        ({"shots": [SHOT | {"video": "a\0b.mp4"}]}, r"video is not a file name: 'a\x00b.mp4'"),
        ({"shots": [SHOT | {"video": "a\ud83d.mp4"}]}, r"video is not a file name: 'a\ud83d.mp4'"),
    ],
)
def test_invalid_lines_of_a_manifest(tmp_path, line, reason):
    path = tmp_path / "clips.jsonl"
    good = json.dumps({"name": "good", "shots": [SHOT]})
    path.write_text(f"{line if isinstance(line, str) else json.dumps(line)}\n{good}\n")
    good, bad = find_samples(path)
    assert good.name == "good" and not good.problem
    assert reason in bad.problem and bad.problem.startswith("line 1: ")
    assert len(bad.problem) < 200


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_newlines_end_a_line_of_a_manifest(tmp_path, end):
    """JSON strings may contain other line separators."""
    captions = ["a\u2028b", "c\u0085d", "e\u2029f"]
    lines = [json.dumps({"shots": [SHOT | {"caption": c}]}, ensure_ascii=False) for c in captions]
    path = tmp_path / "clips.jsonl"
    path.write_bytes(end.join([*lines, ""]).encode())
    samples = find_samples(path)
    assert [s.shots[0].caption for s in samples] == captions
    assert [s.name for s in samples] == ["line 1", "line 2", "line 3"]


def test_numbers_of_any_length_in_names(tmp_path):
    names = ["9" * 5000, "a007", "a7", "a10", "1" + "0" * 5000]
    path = tmp_path / "clips.jsonl"
    path.write_text("\n".join(json.dumps({"name": n, "shots": [SHOT]}) for n in names))
    assert [s.name for s in find_samples(path)] == [names[0], names[4], *names[1:4]]


def test_names_are_unique_and_a_manifest_must_have_samples(tmp_path):
    path = tmp_path / "clips.jsonl"
    path.write_text(f"{json.dumps({'name': 'a', 'shots': [SHOT]})}\n" * 2)
    first, second = find_samples(path)
    assert not first.problem and "already used by line 1" in second.problem
    path.write_text("\n")
    with pytest.raises(UserError, match="has no samples"):
        find_samples(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read as text"):
        find_samples(path)


def test_file_that_is_not_a_manifest_is_refused_as_a_whole(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("clips of the zoo\nand of the sea\n")
    with pytest.raises(UserError, match=r"not a manifest in JSON lines \(it starts with 'clips of"):
        find_samples(path)
