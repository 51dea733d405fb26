"""Lists the samples of a dataset, each an ordered list of captioned shots, without decoding video.

Three layouts are supported: the folders of the reference (its class `MultiVideoConcatDataset`),

    DIR/video/<sample>/<shot>.mp4        or .avi, .mov, .mkv, .webm
    DIR/caption/<sample>/<shot>.json     {"caption": "..."}

a flat folder of clips with their captions (`flat`), and a manifest in JSON lines, one sample per
line, given as the file or as `DIR/manifest.jsonl`:

    {"name": "walk", "shots": [{"video": "a.mp4", "caption": "...", "start": 1.5, "end": 9}, ...]}

`video` is relative to the manifest's folder. `start` and `end` are in seconds and default to the
first and last frame of the file, so several shots can come from one file. A sample without a `name`
is named after its line.

The reference silently leaves out shots whose caption is missing or empty, and reads folders in
file-system order. Here a remark names each shot that is left out, a sample without any shots is
unusable and has a reason, and samples are sorted by name, with numbers ordered by value. Texts are
UTF-8, with or without a byte order mark; names are compared in Unicode's form NFC.
"""

import itertools
import json
import os
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from longlive_jax.data.clips.flat import TABLES, is_flat, read_flat
from longlive_jax.data.clips.samples import (
    SUFFIXES,
    SourceShot,
    Unusable,
    VideoSample,
    caption_in,
    existing_file,
    is_file_name,
    list_entries,
    natural_key,
    one_line,
    sort_samples,
)
from longlive_jax.spec import UserError, reject_unknown

__all__ = [
    "DATASET_MANIFEST",
    "SourceShot",
    "Unusable",
    "VideoSample",
    "find_samples",
    "read_json_lines",
    "usable",
]

DATASET_MANIFEST = "manifest.jsonl"
EXAMPLE = '{"shots": [{"video": "a.mp4", "caption": "a cat runs"}]}'
"""A line of a manifest, for messages."""
MAX_SECONDS = 1e9
"""Upper limit of `start` and `end`: longer than any video, and safe to compute with."""


def find_samples(where: str | Path) -> list[VideoSample]:
    """Returns every sample of a dataset, sorted by name.

    Raises UserError if `where` is not a dataset.
    """
    where = Path(where)
    if where.is_file():
        return sort_samples(_read_manifest(where))
    if not where.is_dir():
        raise UserError(f"{where}: no such dataset; expected a folder or a manifest in JSON lines")
    if (where / DATASET_MANIFEST).is_file():
        return sort_samples(_read_manifest(where / DATASET_MANIFEST))
    if not is_flat(where):
        return sort_samples(_read_layout(where))
    if (where / "caption").is_dir():
        raise UserError(
            f"{where}: mixes two layouts, clips or {' or '.join(TABLES)} directly in it and video/ "
            "with caption/; move one of them to another folder"
        )
    return sort_samples(read_flat(where))


def _read_layout(where: Path) -> list[VideoSample]:
    """The samples in video/ and caption/. Raises UserError if there are none."""
    if not (where / "video").is_dir():
        raise UserError(
            f"{where}: not a dataset; expected video/<sample>/<shot>.mp4 with "
            f"caption/<sample>/<shot>.json, clips with captions (a.mp4, a.txt), or "
            f"{DATASET_MANIFEST}"
        )
    videos, captions = _list_folder(where, "video"), _list_folder(where, "caption")
    misplaced = {path.name: _misplaced(path) for path in videos}
    names = {path.name for path in videos if os.path.isdir(path)}
    composed = {unicodedata.normalize("NFC", name) for name in names}
    names |= {
        path.name
        for path in captions
        if os.path.isdir(path) and unicodedata.normalize("NFC", path.name) not in composed
    }
    names |= {name for name, problem in misplaced.items() if problem}
    if not names:
        raise UserError(f"{where}: has no samples; expected folders video/<sample>/")
    return [
        VideoSample(name, problem=misplaced[name])
        if misplaced.get(name)
        else _read_folders(where, name)
        for name in names
    ]


def usable(samples: Iterable[VideoSample], where: str | Path) -> list[VideoSample]:
    """Returns the samples without a known problem. Raises UserError if there are none."""
    samples = list(samples)
    good = [sample for sample in samples if not sample.problem]
    if not good:
        first = "; ".join(f"{s.name}: {s.problem}" for s in samples[:3])
        raise UserError(f"{where}: none of its {len(samples)} samples can be used ({first})")
    return good


def _list_folder(where: Path, kind: str) -> list[Path]:
    """Entries of `where`/`kind`. Raises UserError if it cannot be read."""
    try:
        return list_entries(where / kind)
    except Unusable as reason:
        raise UserError(f"{where / kind}: {reason}") from reason


def _misplaced(path: Path) -> str:
    """The problem of an entry of video/ that is a stray video file or a broken link; else empty."""
    if os.path.isdir(path):
        return ""
    if path.suffix.lower() in SUFFIXES:
        return f"video/{path.name} is not in a sample folder; move it to video/<sample>/{path.name}"
    if path.is_symlink() and not os.path.exists(path):
        return f"video/{path.name} is a broken link"
    return ""


def _read_folders(root: Path, name: str) -> VideoSample:
    """One sample of the folder layout."""
    # 1. List the video files in order.
    try:
        files = [p for p in list_entries(root / "video" / name) if p.suffix.lower() in SUFFIXES]
    except Unusable as reason:
        return VideoSample(name, problem=f"video/{name} {reason}")
    files.sort(key=lambda p: (not p.stem.isdecimal(), natural_key(p.stem), p.suffix))
    duplicates = [b.name for a, b in itertools.pairwise(files) if a.stem == b.stem]
    if not files:
        return VideoSample(name, problem=f"video/{name} has no video file ({', '.join(SUFFIXES)})")
    if duplicates:
        problem = f"video/{name}/{duplicates[0]}: another file has the same shot number"
        return VideoSample(name, problem=problem)
    # 2. Read their captions.
    shots, remarks = [], []
    captions = existing_file(root / "caption" / name)
    for file in files:
        path = existing_file(captions / f"{file.stem}.json")
        try:
            shots.append(SourceShot(file, caption_in(path, "/".join(path.parts[-3:]))))
        except Unusable as reason:
            remarks.append(f"video/{name}/{file.name} left out: {reason}")
    if not shots:
        return VideoSample(name, problem=f"no shot has a caption: {'; '.join(remarks)}")
    return VideoSample(name, tuple(shots), remarks=tuple(remarks))


def _read_manifest(path: Path) -> list[VideoSample]:
    def read(values: dict[str, Any], name: str) -> VideoSample:
        reject_unknown(values, ("name", "shots"), "sample")
        entries = values.get("shots")
        if not isinstance(entries, list) or not entries:
            raise Unusable(f"shots must be a list of at least one shot, as in {EXAMPLE}")
        shots = tuple(_read_shot(entry, i, path.parent) for i, entry in enumerate(entries))
        return VideoSample(name, shots)

    return read_json_lines(
        path, read, lambda name, problem: VideoSample(name, problem=problem), EXAMPLE
    )


class _Named(Protocol):
    """What has a name."""

    @property
    def name(self) -> str: ...


def read_json_lines[S: _Named](
    path: Path,
    read: Callable[[dict[str, Any], str], S],
    unusable: Callable[[str, str], S],
    example: str,
) -> list[S]:
    """Every sample of a file in JSON lines, in order.

    Args:
      path: the file.
      read: (object of a line, name) -> sample; may raise ValueError. The name is the object's, or
        that of its line.
      unusable: (name, problem) -> sample, for lines that cannot be read and names used before.
      example: a line, for messages.

    Raises UserError for a file that cannot be read, is not in JSON lines, or is empty.
    """
    # 1. Read the lines.
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({one_line(error)})") from error
    texts = [line.strip() for line in lines if line.strip()]
    if texts and not any(text.startswith(("{", "[")) for text in texts):
        raise UserError(
            f"{path}: is not a manifest in JSON lines (it starts with {texts[0][:20]!a}); "
            f"expected lines such as {example}"
        )
    # 2. Turn them into samples.
    samples, line_of = list[S](), dict[str, int]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            sample = read(*_named_object(line, f"line {number}"))
        except (ValueError, RecursionError) as error:  # UserError and Unusable are ValueErrors
            sample = unusable(f"line {number}", f"line {number}: {one_line(error)}")
        if sample.name in line_of:
            where = f"line {number}: the name {sample.name!r} is already used by line"
            sample = unusable(f"line {number}", f"{where} {line_of[sample.name]}")
        line_of[sample.name] = number
        samples.append(sample)
    if not samples:
        raise UserError(f"{path}: has no samples; expected one JSON object per line")
    return samples


def _named_object(line: str, default: str) -> tuple[dict[str, Any], str]:
    """The object of a line, and its name or the default one."""
    values = json.loads(line)
    if not isinstance(values, dict):
        raise Unusable(f"expected an object, got {line.strip()[:40]}")
    if not isinstance(values.get("name", ""), str):
        raise Unusable(f"name must be a string, got {values['name']!r}")
    return values, values.get("name") or default


def _read_shot(values: Any, i: int, folder: Path) -> SourceShot:
    where = f"shots[{i}]"
    if not isinstance(values, dict):
        raise Unusable(f"{where}: expected an object, got {values!r}")
    reject_unknown(values, ("video", "caption", "start", "end"), where)
    for key in ("video", "caption"):
        if not isinstance(values.get(key), str) or not values[key].strip():
            raise Unusable(f"{where}: {key} is missing or empty")
    start, end = values.get("start", 0.0), values.get("end")
    for key, value in (("start", start), ("end", 0.0 if end is None else end)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= MAX_SECONDS:
            raise Unusable(f"{where}: {key} must be seconds >= 0, got {repr(value)[:40]}")
    if not is_file_name(values["video"]):
        raise Unusable(f"{where}: video is not a file name: {ascii(values['video'])[:80]}")
    if end is not None and end <= start:
        raise Unusable(f"{where}: end must be > start = {start}, got {end}")
    file = existing_file(folder / values["video"])
    if "\\" in values["video"] and not os.path.lexists(file):
        forward = values["video"].replace("\\", "/")
        raise Unusable(f"{where}: {values['video']!r} has backslashes; write {forward}")
    return SourceShot(file, values["caption"].strip(), start, end)
