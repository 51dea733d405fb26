"""Flat folders of clips: a caption next to every video, or one table of captions.

    DIR/clip.mp4  DIR/clip.txt                  or clip.caption, or clip.json: {"caption": "..."}
    DIR/clip.mp4  DIR/metadata.jsonl            or metadata.csv, with a row for every video

The table has a column of file names (`file_name`, `video`, `video_path` or `path`) and one of
captions (`text`, `caption` or `prompt`); other columns are ignored. Every video is one sample of
one shot, and samples have the names of their files.
"""

import csv
import io
import json
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
)
from longlive_jax.spec import UserError

__all__ = ["TABLES", "is_flat", "read_flat"]

TABLES = ("metadata.jsonl", "metadata.csv")
CAPTION_SUFFIXES = (".txt", ".caption", ".json")
FILE_COLUMNS = ("file_name", "video", "video_path", "path")
CAPTION_COLUMNS = ("text", "caption", "prompt")


def is_flat(folder: Path) -> bool:
    """Whether a folder has video files, or a table of captions."""
    return bool(_videos(folder)) or _table(folder) is not None


def read_flat(folder: Path) -> list[VideoSample]:
    """Every video of a flat folder as a sample.

    Raises UserError for two tables, or a table without the two columns.
    """
    videos, table = _videos(folder), _table(folder)
    if table is None:
        return [_with_caption_file(folder, video, videos) for video in videos]
    listed = _read_table(table)
    names = {unicodedata.normalize("NFC", sample.name) for sample in listed}
    rest = (v.name for v in videos if unicodedata.normalize("NFC", v.name) not in names)
    unlisted = [VideoSample(name, problem=f"{table.name} has no row for it") for name in rest]
    return listed + unlisted


def _videos(folder: Path) -> list[Path]:
    """The video files of a folder in order. Raises UserError if it cannot be read."""
    try:
        files = [p for p in list_entries(folder) if p.suffix.lower() in SUFFIXES]
    except Unusable as reason:
        raise UserError(f"{folder}: {reason}") from reason
    return sorted((p for p in files if not p.is_dir()), key=lambda p: natural_key(p.name))


def _table(folder: Path) -> Path | None:
    """The table of captions in a folder. Raises UserError if there are two."""
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(tables) > 1:
        raise UserError(f"{folder}: has {' and '.join(TABLES)}; remove one of them")
    return tables[0] if tables else None


def _with_caption_file(folder: Path, video: Path, videos: list[Path]) -> VideoSample:
    """A video and the caption in the file next to it."""
    twins = [v.name for v in videos if v.stem == video.stem and v != video]
    if twins:
        return VideoSample(video.name, problem=f"{twins[0]} has the same name; rename one of them")
    candidates = (existing_file(folder / f"{video.stem}{end}") for end in CAPTION_SUFFIXES)
    files = [path for path in candidates if path.exists()]
    if not files:
        names = ", ".join(f"{video.stem}{end}" for end in CAPTION_SUFFIXES)
        return VideoSample(video.name, problem=f"has no caption; expected one of {names}")
    try:
        captions = {path.name: caption_in(path, path.name) for path in files}
    except Unusable as reason:
        return VideoSample(video.name, problem=str(reason))
    if len(set(captions.values())) > 1:
        problem = f"the captions in {' and '.join(captions)} differ; remove one of them"
        return VideoSample(video.name, problem=problem)
    return VideoSample(video.name, (SourceShot(video, captions[files[0].name]),))


def _read_table(table: Path) -> list[VideoSample]:
    """The samples of a table of captions; a bad row is a sample with a problem."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{table}: cannot be read as text ({one_line(error)})") from error
    rows = _csv_rows(table, text) if table.suffix == ".csv" else _json_rows(text)
    samples, lines = [], dict[str, int]()
    for number, row in rows:
        try:
            sample = _row_sample(table, row)
            if sample.name in lines:
                raise Unusable(f"{sample.name} is listed already in line {lines[sample.name]}")
            lines[sample.name] = number
        except Unusable as reason:
            sample = VideoSample(f"line {number}", problem=f"line {number}: {reason}")
        samples.append(sample)
    if not samples:
        raise UserError(f"{table}: has no rows; expected one for every video")
    return samples


def _csv_rows(table: Path, text: str) -> Iterator[tuple[int, Any]]:
    """(line, row) of a table with a header. Raises UserError if the header lacks a column."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for kind, columns in (("file", FILE_COLUMNS), ("caption", CAPTION_COLUMNS)):
            if not set(columns) & set(reader.fieldnames or ()):
                raise UserError(
                    f"{table}: has no {kind} column; its header needs one of {', '.join(columns)}"
                )
        yield from ((reader.line_num, row) for row in reader)
    except csv.Error as error:
        raise UserError(f"{table}: line {reader.line_num}: {one_line(error)}") from error


def _json_rows(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, one_line(error)


def _row_sample(table: Path, row: Any) -> VideoSample:
    """The sample of a row. Raises Unusable if it names no video or no caption."""
    if not isinstance(row, Mapping):
        raise Unusable(f"expected an object, got {str(row)[:80]}")
    name, caption = (_value(row, columns) for columns in (FILE_COLUMNS, CAPTION_COLUMNS))
    if not is_file_name(name):
        raise Unusable(f"not a file name: {ascii(name)[:80]}")
    path = existing_file(table.parent / name)
    if not path.exists() and "\\" in name:
        raise Unusable(f"{name!r} has backslashes; write {name.replace(chr(92), '/')}")
    if not path.exists():
        raise Unusable(f"{name} is missing")
    return VideoSample(name, (SourceShot(path, " ".join(caption.split())),))


def _value(row: Mapping[str, Any], columns: tuple[str, ...]) -> str:
    """The first of these columns that has text. Raises Unusable if none has."""
    values = (row.get(column) for column in columns)
    text = next((value for value in values if isinstance(value, str) and value.strip()), None)
    if text is None:
        raise Unusable(f"has no {' or '.join(columns)}")
    return text.strip()
