"""Samples of a dataset, and what the readers of all its layouts have in common."""

import dataclasses
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

from longlive_jax.io.decoding import Unusable

__all__ = [
    "SUFFIXES",
    "SourceShot",
    "Unusable",
    "VideoSample",
    "caption_in",
    "existing_file",
    "is_file_name",
    "list_entries",
    "natural_key",
    "one_line",
    "sort_samples",
]

SUFFIXES = (".avi", ".mkv", ".mov", ".mp4", ".webm")
"""Extensions of video files."""


@dataclasses.dataclass(frozen=True)
class SourceShot:
    """A captioned shot: a segment of a video file.

    Attributes:
      file: the video file.
      caption: the shot's caption.
      start: beginning in the file, in seconds.
      end: end in the file, in seconds; None for the end of the file.
    """

    file: Path
    caption: str
    start: float = 0.0
    end: float | None = None


@dataclasses.dataclass(frozen=True)
class VideoSample:
    """A sample of a dataset: a video that consists of consecutive shots.

    Attributes:
      name: the sample's name.
      shots: its shots in order.
      problem: why it cannot be used, as known without opening a video; empty if it can.
      remarks: shots that were left out, and why.
    """

    name: str
    shots: tuple[SourceShot, ...] = ()
    problem: str = ""
    remarks: tuple[str, ...] = ()


def sort_samples(samples: Iterable[VideoSample]) -> list[VideoSample]:
    """The samples by name, with numbers ordered by value."""
    return sorted(samples, key=lambda sample: natural_key(sample.name))


def natural_key(name: str) -> tuple:
    """Sort key that orders numbers by value (2 before 10), even those too long for `int`."""
    parts = re.split(r"([0-9]+)", name)
    digits = (part.lstrip("0") for part in parts[1::2])
    pairs = zip(((len(d), d) for d in digits), parts[2::2], strict=True)
    return (parts[0], *pairs), name


def list_entries(folder: Path) -> list[Path]:
    """Entries of a folder except hidden ones; empty if it does not exist.

    Raises Unusable if it cannot be read.
    """
    try:
        entries = list(folder.iterdir()) if os.path.isdir(folder) else []
    except OSError as error:
        raise Unusable(f"cannot be read ({error.strerror})") from error
    return [path for path in entries if not path.name.startswith(".")]


def existing_file(path: Path) -> Path:
    """`path`, or the entry of its folder whose name is the same in Unicode's form NFC.

    Folders that were copied from macOS may have decomposed names.
    """
    if os.path.lexists(path) or path.name.isascii():
        return path
    wanted = unicodedata.normalize("NFC", path.name)
    try:
        names = os.listdir(path.parent)
    except OSError:
        return path  # opening the file gives the reason
    same = (name for name in names if unicodedata.normalize("NFC", name) == wanted)
    return path.with_name(next(same, path.name))


def caption_in(path: Path, short_name: str) -> str:
    """The caption in a file: the field `caption` of a .json file, or else all of the text.

    `short_name` names the file in messages. Raises Unusable if there is no caption.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise Unusable(f"{short_name} is not a regular file")
    # 1. Read the text.
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        why = "is missing" if missing else f"cannot be read ({error.strerror})"
        raise Unusable(f"{short_name} {why}") from error
    except UnicodeDecodeError as error:
        raise Unusable(f"{short_name} is not UTF-8 text; save it as UTF-8") from error
    if path.suffix.lower() != ".json":
        if not text.strip():
            raise Unusable(f"{short_name} is empty; write the caption into it")
        return " ".join(text.split())
    # 2. Take the caption out of JSON.
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{short_name} is not valid JSON ({one_line(error)})") from error
    caption = values.get("caption") if isinstance(values, Mapping) else None
    if not isinstance(caption, str) or not caption.strip():
        raise Unusable(f'{short_name} has no caption; expected {{"caption": "..."}}')
    return caption.strip()


def is_file_name(name: str) -> bool:
    """Whether a file can have this name: it can be encoded and has no zero byte."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def one_line(error: Exception) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())
