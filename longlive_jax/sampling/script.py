"""Shot scripts: prompts, their durations, and where the camera cuts.

A script is a list of segments. Each has a prompt, a duration, and `cut`: true (the default) begins
a new shot, false changes the prompt within the shot. Only a cut adds the prompt prefix that the
model was trained with, moves the shot sink and offsets the positions. The first segment begins the
video; when a video is continued, it continues the last shot unless it says `cut: true`.

    shots:
      - {prompt: a red circle drifts left, seconds: 4}
      - {prompt: a blue square rises, chunks: 3}
      - {prompt: the blue square falls, seconds: 2, cut: false}
    seed: 7
    size: [64, 64]          # height, width; optional
    image: first.png        # conditions the first frame; optional, relative to this file
    negative_prompt: blurry # optional
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longlive_jax.io.pictures import check_image
from longlive_jax.sampling.documents import read_document, read_text
from longlive_jax.spec import UserError, build, check_types, reject_unknown

SIZE_MULTIPLE = 32
"""Pixels per token edge: 16 by the VAE times 2 by the patch embedding."""
MAX_EDGE = 8192
"""Limit of height and width in pixels."""
MAX_CHUNKS = 200_000
"""Limit of the chunks of a video: more than a day, at 16 frames per chunk."""
MAX_SECONDS = 86_400.0
"""Limit of the seconds of a shot: a day. `endless` streams have no limit."""


SHOT_FORM = "{prompt: TEXT, seconds: NUMBER}"
"""What a shot of a script file looks like."""


@dataclasses.dataclass(frozen=True)
class Shot:
    """One segment of a script.

    Attributes:
      prompt: what it shows.
      seconds: duration in seconds; exactly one of seconds and chunks is set.
      chunks: duration in chunks.
      cut: whether the segment begins a new shot. None, the default, is true, except for the first
        segment of a continued video, which continues the last shot. The first segment of a new
        video is never a cut.
    """

    prompt: str
    seconds: float | None = None
    chunks: int | None = None
    cut: bool | None = None

    def __post_init__(self) -> None:
        # 1. The prompt.
        if not isinstance(self.prompt, str):
            raise UserError(f"a shot needs a prompt, a string, got {str(self.prompt)[:80]!r}")
        if not self.prompt.strip():
            raise UserError(f"a shot needs a prompt, got {excerpt(self.prompt)!r}")
        if any("\ud800" <= letter <= "\udfff" for letter in self.prompt):
            raise UserError(f"prompt {excerpt(self.prompt)!r} has half a surrogate pair; retype it")
        # 2. The duration.
        where = f"shot {excerpt(self.prompt)!r}"
        try:
            check_types(self)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if (self.seconds is None) == (self.chunks is None):
            raise UserError(f"{where}: give either seconds or chunks")
        name, limit = ("chunks", MAX_CHUNKS) if self.seconds is None else ("seconds", MAX_SECONDS)
        value = getattr(self, name)
        if not value > 0:
            raise UserError(f"{where}: {name} must be positive, got {value!r}")
        if value > limit:
            number = f"{value:g}" if value < 1e9 else "more than 1e9"
            raise UserError(f"{where}: {name} must be positive and <= {limit:g}, got {number}")

    def length(self, chunk_seconds: float) -> int:
        """Duration in chunks, rounded up."""
        if self.chunks is not None:
            return self.chunks
        assert self.seconds is not None
        return max(1, math.ceil(self.seconds / chunk_seconds - 1e-6))


@dataclasses.dataclass(frozen=True)
class ShotScript:
    """The script of one video.

    Raises UserError for no shots, an illegal size, or an image that is missing or unreadable.

    Attributes:
      shots: the segments, in order.
      seed: seed of the noise, in [0, 2**32).
      size: (height, width) in pixels, or None for the model's default.
      image: path of a picture that conditions the first frame.
      negative_prompt: prompt that guidance moves away from, or None for the model's default.
      name: name for files and messages.
      notes: remarks for the user, such as captions beyond the length of the video.
    """

    shots: tuple[Shot, ...]
    seed: int = 0
    size: tuple[int, int] | None = None
    image: str | None = None
    negative_prompt: str | None = None
    name: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # 1. Types.
        if self.size is not None and (
            not isinstance(self.size, tuple | list) or len(self.size) != 2
        ):
            raise UserError(f"size must be (height, width) in pixels, got {self.size!r}")
        if isinstance(self.image, os.PathLike):
            object.__setattr__(self, "image", os.fspath(self.image))
        check_types(self)
        # 2. Values.
        if not self.shots:
            raise UserError("the script has no shots; give at least one {prompt, seconds}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be in [0, 2**32), got {self.seed}")
        if self.size is not None:
            check_size(*self.size)
        if self.image is not None:
            check_image(self.image)

    def is_cut(self, index: int, *, continues: bool = False) -> bool:
        """Whether shot `index` begins with a cut; `continues`: the script continues a video."""
        cut = self.shots[index].cut
        return continues and bool(cut) if index == 0 else cut is not False

    @classmethod
    def of(
        cls,
        *prompts: str,
        seconds: float | None = None,
        chunks: int | None = None,
        **settings: Any,
    ) -> "ShotScript":
        """A script of shots of equal duration with a cut between any two.

        `seconds` or `chunks` is the duration of each shot; `settings` are other fields of the
        script.
        """
        return cls(tuple(Shot(p, seconds=seconds, chunks=chunks) for p in prompts), **settings)

    @classmethod
    def read(cls, path: str | Path, **settings: Any) -> "ShotScript":
        """The script in `path`; UserError if there are several. See `read_scripts`."""
        scripts = read_scripts(path, **settings)
        if len(scripts) > 1:
            raise UserError(f"{path} has {len(scripts)} videos; use read_scripts")
        return scripts[0]


def check_size(height: int, width: int, *, multiple: int = SIZE_MULTIPLE) -> None:
    """UserError, with the nearest legal sizes, unless both edges are legal multiples."""
    if max(height, width) > MAX_EDGE:
        raise UserError(
            f"size {height}x{width} (height x width) must be <= {MAX_EDGE} pixels on each side"
        )
    if all(edge > 0 and edge % multiple == 0 for edge in (height, width)):
        return
    below = [max(multiple, edge // multiple * multiple) for edge in (height, width)]
    above = [max(multiple, -(-edge // multiple) * multiple) for edge in (height, width)]
    near = [sorted(set(pair)) for pair in zip(below, above, strict=True)]
    legal = ", ".join(f"{h}x{w}" for h in near[0] for w in near[1])
    raise UserError(
        f"size {height}x{width} (height x width) is not divisible by {multiple}; nearest: {legal}"
    )


def read_size(text: str, name: str) -> tuple[int, int]:
    """(height, width) of `HEIGHTxWIDTH`; UserError, which begins with `name`, for anything else."""
    try:
        height, width = (int(edge) for edge in text.lower().split("x"))
    except ValueError:
        raise UserError(f"{name} must be HEIGHTxWIDTH, such as 704x1280, got {text!r}") from None
    return height, width


def read_scripts(
    path: str | Path, *, chunks: int | None = None, chunks_per_shot: int | None = None
) -> list[ShotScript]:
    """Reads a YAML or JSON script, a text file of captions, or a caption folder.

    A JSON file may be the record of a sampled video, which has its script.

    A text file has one single-shot video per line. A folder has `caption/<video>/<shot>.json` with
    `{"caption": ...}` (or directly the videos, or the shots of one video), and optionally
    `shot_durations.txt` with the chunks of each shot.

    Args:
      path: the file or folder.
      chunks: total length of each video from a text file or folder; required for a text file, and
        for a folder without durations.
      chunks_per_shot: length of each shot from a folder without `shot_durations.txt`.

    Raises UserError for a path that is not a script or does not say how long the videos are.
    """
    # 1. Arguments.
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path of a script must be a string or a Path, got {path!r}")
    path = Path(path)
    for name, value in (("chunks", chunks), ("chunks_per_shot", chunks_per_shot)):
        if value is not None and (type(value) is not int or not 0 < value <= MAX_CHUNKS):
            raise UserError(f"{name} must be positive and <= {MAX_CHUNKS}, got {value!r}")
    # 2. One reader per layout.
    if path.is_dir():
        return [
            _read_captions(folder, chunks, chunks_per_shot) for folder in _caption_folders(path)
        ]
    if not path.is_file():
        raise UserError(f"no script at {path}; check the path")
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return _read_lines(path, chunks)
    if suffix not in (".yaml", ".yml", ".json"):
        raise UserError(f"{path}: a script ends in .yaml, .json or .txt, or is a caption folder")
    return [parse_script(read_document(path), folder=path.parent, name=path.stem, where=str(path))]


def excerpt(text: str) -> str:
    """The text, or its beginning if it is long, for messages."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def parse_script(
    values: Any, *, folder: Path = Path(), name: str = "", where: str = "script"
) -> ShotScript:
    """A script from its nested mapping.

    `image` is relative to `folder`; `name` is the default name, and `where` begins error messages.
    Raises UserError for unknown keys and invalid values.
    """
    try:
        return _parse_script(values, folder, name, where)
    except ValueError as error:
        # A value can be as long as the file; the place is at the beginning.
        raise UserError(" ".join(str(error).split())[: len(where) + 300]) from error


def _parse_script(values: Any, folder: Path, name: str, where: str) -> ShotScript:
    if not isinstance(values, Mapping):
        raise UserError(
            f"{where}: expected 'shots: [...]', a list of {SHOT_FORM}, got {type(values).__name__}"
        )
    if values.get("generated") is True and isinstance(values.get("script"), Mapping):
        values = values["script"]  # the record of a sampled video
    known = ("shots", "seed", "size", "image", "negative_prompt", "name")
    reject_unknown(map(str, values), known, where)
    values = {"name": name, **values}
    shots = values.get("shots") or []
    if not isinstance(shots, Sequence) or isinstance(shots, str):
        raise UserError(f"{where}: shots must be a list of {SHOT_FORM}")
    for i, shot in enumerate(shots):
        if not isinstance(shot, Mapping):
            got = repr(excerpt(shot)) if isinstance(shot, str) else type(shot).__name__
            raise UserError(f"{where}: shots[{i}] must be {SHOT_FORM}, got {got}")
    values["shots"] = [
        build(Shot, shot, path=f"{where}: shots[{i}]") for i, shot in enumerate(shots)
    ]
    if isinstance(values.get("size"), str):
        values["size"] = read_size(values["size"], f"{where}: size")
    if isinstance(values.get("image"), str):
        values["image"] = str(folder / values["image"])
    return build(ShotScript, values, path=where)


def _read_lines(path: Path, chunks: int | None) -> list[ShotScript]:
    lines = [line.strip() for line in read_text(path).splitlines()]
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"{path}: no captions; write one per line")
    if chunks is None:
        raise UserError(f"{path}: a text file has no durations; give chunks, such as --chunks=6")
    return [
        ShotScript((_shot(prompt, chunks, path),), name=f"{path.stem}-{i}")
        for i, prompt in enumerate(prompts)
    ]


def _shot(prompt: str, chunks: int, where: Path) -> Shot:
    """A shot; UserErrors begin with `where`."""
    return build(Shot, {"prompt": prompt, "chunks": chunks}, path=str(where))


def _caption_folders(root: Path) -> list[Path]:
    root = root / "caption" if (root / "caption").is_dir() else root
    if any(root.glob("*.json")):
        return [root]
    folders = sorted(p for p in root.iterdir() if p.is_dir() and any(p.glob("*.json")))
    if not folders:
        raise UserError(f"{root}: no caption files; expected caption/<video>/<shot>.json")
    return folders


def _read_captions(folder: Path, chunks: int | None, chunks_per_shot: int | None) -> ShotScript:
    files = [p for p in folder.glob("*.json") if p.name != "global.json"]
    # Named shots come before numbered ones, and 2 before 10, as in the released tools.
    files.sort(key=lambda p: (p.stem.isdecimal(), int(p.stem) if p.stem.isdecimal() else 0, p.stem))
    captions = [_caption(path) for path in files]
    if not captions:
        raise UserError(f"{folder}: no caption files besides global.json")
    counts = _durations(folder, len(captions), chunks, chunks_per_shot)
    used = [(text, n) for text, n in zip(captions, counts, strict=False) if n > 0]
    notes: tuple[str, ...] = ()
    if len(used) < len(captions):
        notes = (f"{folder.name}: {len(used)} of {len(captions)} shots fit the length",)
    shots = tuple(_shot(text, n, folder) for text, n in used)
    return ShotScript(shots, name=folder.name, notes=notes)


def _caption(path: Path) -> str:
    values = read_document(path)
    text = values.get("caption") if isinstance(values, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{path}: expected {{"caption": "..."}}')
    return text.strip()


_DURATION = re.compile(r"0*[1-9][0-9]{0,8}")


def _durations(
    folder: Path, shots: int, chunks: int | None, chunks_per_shot: int | None
) -> list[int]:
    """Chunks of each shot: from the file, else `chunks_per_shot`, else `chunks` split evenly.

    A total of `chunks` truncates the list, or extends the last shot used.
    """
    # 1. Durations without a total.
    path = folder / "shot_durations.txt"
    if path.is_file():
        words = read_text(path).replace(",", " ").split()
        if not words or not all(_DURATION.fullmatch(word) for word in words):
            raise UserError(
                f"{path}: expected positive integers (chunks), got {' '.join(words)[:80]!r}"
            )
        counts = [int(word) for word in words]
        if len(counts) > shots:
            raise UserError(f"{path}: {len(counts)} durations for {shots} shots")
    elif chunks_per_shot is not None:
        counts = [chunks_per_shot] * shots
    elif chunks is not None:
        counts = [chunks // shots + (i < chunks % shots) for i in range(shots)]
    else:
        raise UserError(f"{folder}: no shot_durations.txt; give chunks, such as --chunks=6")
    if chunks is None:
        return counts
    # 2. Fit them to the total.
    remaining, fitted = chunks, []
    for count in counts:
        fitted.append(min(count, remaining))
        remaining -= fitted[-1]
    last = max(i for i, count in enumerate(fitted) if count)
    fitted[last] += remaining
    return fitted
