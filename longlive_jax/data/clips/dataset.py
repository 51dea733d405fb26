"""What lies on disk: samples of ordered shots with captions. Nothing is decoded to list them.

Two layouts are read. The reference's folders (its dataset `MultiVideoConcatDataset`):

    DIR/video/<sample>/<shot>.mp4        or .avi, .mov, .mkv, .webm
    DIR/caption/<sample>/<shot>.json     {"caption": "..."}

and a manifest in JSON lines, one sample a line, given as the file or as `DIR/manifest.jsonl`:

    {"name": "walk", "shots": [{"video": "a.mp4", "caption": "...", "start": 1.5, "end": 9}, ...]}

`video` is looked up from the manifest's folder. `start` and `end` (seconds of the file) default to
its first and last frame, so several shots can be cut from one file. Without a `name`, a sample is
called by its line.

The reference leaves out shots whose caption is missing or empty without a word, and takes folders
in the order of the file system. Here a shot is left out with a remark, a sample that is left with
no shot is unusable with a reason, and samples are sorted, numbers in their names by value.
"""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from longlive_jax.spec import UserError, reject_unknown

__all__ = ["MANIFEST", "Sample", "Shot", "Unusable", "find_samples", "usable"]

MANIFEST = "manifest.jsonl"
LONGEST = 1e9
"""Seconds: no video is longer, and such a number can be computed with."""

SUFFIXES = (".avi", ".mkv", ".mov", ".mp4", ".webm")


class Unusable(ValueError):
    """A sample, or a part of it, cannot be used; the text is the reason, on one line."""


@dataclasses.dataclass(frozen=True)
class Shot:
    """A camera take: `start` to `end` (seconds; None: the end) of a video file, and its caption."""

    file: Path
    caption: str
    start: float = 0.0
    end: float | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """A video of shots in order.

    Attributes:
      problem: why it cannot be used, known without opening a video; empty if nothing is wrong.
      remarks: what was left out of it.
    """

    name: str
    shots: tuple[Shot, ...] = ()
    problem: str = ""
    remarks: tuple[str, ...] = ()


def find_samples(where: str | Path) -> list[Sample]:
    """Every sample of a dataset, sorted by name; UserError if `where` is no dataset."""
    where = Path(where)
    if where.is_file():
        return _sorted(_read_manifest(where))
    if not where.is_dir():
        raise UserError(f"{where}: no such dataset; give a folder or a manifest in JSON lines")
    if (where / MANIFEST).is_file():
        return _sorted(_read_manifest(where / MANIFEST))
    if not (where / "video").is_dir():
        raise UserError(
            f"{where}: no dataset; expected video/<sample>/<shot>.mp4 with "
            f"caption/<sample>/<shot>.json, or {MANIFEST}"
        )
    videos, captions = _listed(where, "video"), _listed(where, "caption")
    astray = {path.name: _astray(path) for path in videos}
    names = {path.name for path in (*videos, *captions) if os.path.isdir(path)}
    names |= {name for name, problem in astray.items() if problem}
    if not names:
        raise UserError(f"{where}: no sample; expected folders video/<sample>/")
    return _sorted(
        Sample(name, problem=astray[name]) if astray.get(name) else _read_folders(where, name)
        for name in names
    )


def usable(samples: Iterable[Sample], where: str | Path) -> list[Sample]:
    """The samples without a known problem; UserError if there is none."""
    samples = list(samples)
    good = [sample for sample in samples if not sample.problem]
    if not good:
        first = "; ".join(f"{s.name}: {s.problem}" for s in samples[:3])
        raise UserError(f"{where}: none of its {len(samples)} samples can be used ({first})")
    return good


def _sorted(samples: Iterable[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda sample: _natural(sample.name))


def _natural(name: str) -> tuple:
    """Sorts digits by value: 2 before 10. Numbers may be longer than Python reads."""
    parts = re.split(r"([0-9]+)", name)
    digits = (part.lstrip("0") for part in parts[1::2])
    pairs = zip(((len(d), d) for d in digits), parts[2::2], strict=True)
    return (parts[0], *pairs), name


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, hidden files aside; nothing if it is absent. Unusable if unreadable."""
    try:
        found = list(folder.iterdir()) if os.path.isdir(folder) else []
    except OSError as error:
        raise Unusable(f"cannot be read ({error.strerror})") from error
    return [path for path in found if not path.name.startswith(".")]


def _listed(where: Path, kind: str) -> list[Path]:
    """What `where`/`kind` holds; UserError if it cannot be read."""
    try:
        return _entries(where / kind)
    except Unusable as reason:
        raise UserError(f"{where / kind}: {reason}") from reason


def _astray(path: Path) -> str:
    """What is wrong with an entry of video/ that was surely meant as a sample, and is no folder."""
    if os.path.isdir(path):
        return ""
    if path.suffix.lower() in SUFFIXES:
        return f"video/{path.name} is in no sample's folder; move it to video/<sample>/{path.name}"
    if path.is_symlink() and not os.path.exists(path):
        return f"video/{path.name} is a link that leads nowhere"
    return ""


def _read_folders(root: Path, name: str) -> Sample:
    try:
        files = [p for p in _entries(root / "video" / name) if p.suffix.lower() in SUFFIXES]
    except Unusable as reason:
        return Sample(name, problem=f"video/{name} {reason}")
    files.sort(key=lambda p: (not p.stem.isdecimal(), _natural(p.stem), p.suffix))
    twice = [b.name for a, b in itertools.pairwise(files) if a.stem == b.stem]
    if not files:
        return Sample(name, problem=f"video/{name} has no video file ({', '.join(SUFFIXES)})")
    if twice:
        return Sample(name, problem=f"video/{name}/{twice[0]}: another file is the same shot")
    shots, remarks = [], []
    for file in files:
        try:
            shots.append(Shot(file, _caption(root / "caption" / name / f"{file.stem}.json")))
        except Unusable as reason:
            remarks.append(f"video/{name}/{file.name} left out: {reason}")
    if not shots:
        return Sample(name, problem=f"no shot has a caption: {'; '.join(remarks)}")
    return Sample(name, tuple(shots), remarks=tuple(remarks))


def _caption(path: Path) -> str:
    """The caption in a JSON file; Unusable if there is none."""
    shown = "/".join(path.parts[-3:])
    if os.path.exists(path) and not os.path.isfile(path):
        raise Unusable(f"{shown} is no regular file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        why = "is missing" if missing else f"cannot be read ({error.strerror})"
        raise Unusable(f"{shown} {why}") from error
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{shown} is not valid JSON ({_line(error)})") from error
    text = values.get("caption") if isinstance(values, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise Unusable(f'{shown} has no caption; expected {{"caption": "..."}}')
    return text.strip()


def _read_manifest(path: Path) -> list[Sample]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({_line(error)})") from error
    samples, seen = [], dict[str, int]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        sample = _read_line(line, number, path.parent)
        if sample.name in seen:
            where = f"line {number}: the name {sample.name!r} is also that of line"
            sample = Sample(f"line {number}", problem=f"{where} {seen[sample.name]}")
        seen[sample.name] = number
        samples.append(sample)
    if not samples:
        raise UserError(f"{path}: no sample in it; write one JSON object a line")
    return samples


def _read_line(line: str, number: int, folder: Path) -> Sample:
    name = f"line {number}"
    try:
        values = json.loads(line)
        if not isinstance(values, dict):
            raise Unusable(f"expected an object, got {line.strip()[:40]}")
        reject_unknown(values, ("name", "shots"), "sample")
        shots = values.get("shots")
        if not isinstance(shots, list) or not shots:
            raise Unusable("shots must be a list with at least one shot")
        found = tuple(_read_shot(shot, i, folder) for i, shot in enumerate(shots))
        if not isinstance(values.get("name", ""), str):
            raise Unusable(f"name must be a text, got {values['name']!r}")
    except (ValueError, RecursionError) as error:  # UserError and Unusable are ValueErrors
        return Sample(name, problem=f"line {number}: {_line(error)}")
    return Sample(values.get("name") or name, found)


def _read_shot(values: Any, i: int, folder: Path) -> Shot:
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
        if not number or not 0 <= value <= LONGEST:
            raise Unusable(f"{where}: {key} must be seconds from 0 on, got {repr(value)[:40]}")
    if _no_file_name(values["video"]):
        raise Unusable(f"{where}: video is no file name: {ascii(values['video'])[:80]}")
    if end is not None and end <= start:
        raise Unusable(f"{where}: end {end} is not after start {start}")
    return Shot(folder / values["video"], values["caption"].strip(), start, end)


def _no_file_name(name: str) -> bool:
    """Whether no file can be called so: with a zero byte, or characters that no encoding has."""
    try:
        return b"\0" in os.fsencode(name)
    except UnicodeEncodeError:
        return True


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
