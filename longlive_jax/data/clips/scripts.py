"""Scripts of videos that need not exist: captions of shots, their chunks, perhaps a first image.

They come from a file in JSON lines, one video per line,

    {"name": "walk", "shots": [{"caption": "...", "chunks": 2}, ...], "image": "walk.png"}

or from the samples of a dataset of videos (`dataset`), whose captions are scripts without `chunks`.
`name`, `chunks`, `cut` (false: the shot continues the one before it with another caption) and
`image` (relative to the file's folder) may be missing.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.data.clips.dataset import SourceShot, Unusable, VideoSample, read_json_lines
from longlive_jax.data.clips.decoding import read_frames
from longlive_jax.io.pictures import read_image, to_uint8
from longlive_jax.spec import UserError, reject_unknown
from longlive_jax.typing import UInt8

__all__ = [
    "PromptScript",
    "ScriptShot",
    "pictures_by_name",
    "read_picture",
    "read_script_lines",
    "sample_scripts",
    "with_pictures",
]

SCRIPT_EXAMPLE = '{"shots": [{"caption": "a cat runs", "chunks": 2}]}'
"""A line of a file of scripts, for messages."""

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Extensions of pictures in a folder of first images."""


@dataclasses.dataclass(frozen=True)
class ScriptShot:
    """A shot of a script.

    Attributes:
      caption: what it shows, without the cut prefix.
      chunks: its duration in chunks; None if the script does not say.
      cut: whether it begins with a cut, unless it is the first.
    """

    caption: str
    chunks: int | None = None
    cut: bool = True


@dataclasses.dataclass(frozen=True)
class PromptScript:
    """The shots of one video.

    Attributes:
      name: its name, for messages and for files of first images.
      shots: the shots in order.
      image: picture of the first frame, or the video whose first frame it is; None without one.
      problem: why the script cannot be used; empty if it can.
    """

    name: str
    shots: tuple[ScriptShot, ...] = ()
    image: Path | SourceShot | None = None
    problem: str = ""


def read_script_lines(path: Path) -> list[PromptScript]:
    """Every script of a file in JSON lines, in order.

    A line that is not a script has a `problem`. Raises UserError for a file that cannot be read,
    is not in JSON lines, or is empty.
    """

    def read(values: Mapping[str, Any], name: str) -> PromptScript:
        reject_unknown(values, ("name", "shots", "image"), "script")
        entries = values.get("shots")
        if not isinstance(entries, list) or not entries:
            raise Unusable(f"shots must be a list of at least one shot, as in {SCRIPT_EXAMPLE}")
        shots = tuple(_read_shot(entry, i) for i, entry in enumerate(entries))
        missing = [i for i, shot in enumerate(shots) if shot.chunks is None]
        if 0 < len(missing) < len(shots):
            raise Unusable(
                f"shots[{missing[0]}]: chunks is missing; give it for every shot, or for none"
            )
        image = values.get("image")
        if image is not None and not isinstance(image, str):
            raise Unusable(f"image must be a path, got {str(image)[:40]!r}")
        return PromptScript(name, shots, None if image is None else path.parent / image)

    return read_json_lines(
        path, read, lambda name, problem: PromptScript(name, problem=problem), SCRIPT_EXAMPLE
    )


def _read_shot(values: Any, i: int) -> ScriptShot:
    where = f"shots[{i}]"
    if not isinstance(values, Mapping):
        raise Unusable(f"{where}: expected an object, got {str(values)[:40]!r}")
    reject_unknown(values, ("caption", "chunks", "cut"), where)
    caption, chunks, cut = (
        values.get(key, default)
        for key, default in (("caption", ""), ("chunks", None), ("cut", True))
    )
    if not isinstance(caption, str) or not caption.strip():
        raise Unusable(f"{where}: caption is missing or empty")
    if chunks is not None and (type(chunks) is not int or chunks < 1):
        raise Unusable(f"{where}: chunks must be a whole number >= 1, got {chunks!r}")
    if not isinstance(cut, bool):
        raise Unusable(f"{where}: cut must be true or false, got {cut!r}")
    return ScriptShot(caption.strip(), chunks, cut)


def sample_scripts(samples: Sequence[VideoSample]) -> list[PromptScript]:
    """The captions of a dataset's samples as scripts; their images are the first frames."""
    return [
        PromptScript(
            sample.name,
            tuple(ScriptShot(shot.caption) for shot in sample.shots),
            sample.shots[0] if sample.shots else None,
            sample.problem,
        )
        for sample in samples
    ]


def pictures_by_name(folder: Path) -> dict[str, Path]:
    """The pictures of a folder by file name without extension.

    Raises UserError for a folder that does not exist or has no picture, and for two of one name.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of first images; check --first_images")
    pictures = dict[str, Path]()
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in PICTURE_SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in pictures:
            raise UserError(f"{path}: {pictures[path.stem].name} has the same name; remove one")
        pictures[path.stem] = path
    if not pictures:
        raise UserError(f"{folder}: has no pictures ({', '.join(PICTURE_SUFFIXES)})")
    return pictures


def with_pictures(
    scripts: Sequence[PromptScript], pictures: Mapping[str, Path] | None
) -> list[PromptScript]:
    """The scripts with pictures by name, or with None their own images, as first images.

    Scripts without one get a `problem`.
    """
    result = []
    for script in scripts:
        image = script.image if pictures is None else pictures.get(script.name)
        problem = script.problem
        if image is None and not problem:
            problem = "has no first image"
            if pictures is not None:
                problem += f"; expected {script.name}.png or another picture of this name"
        elif isinstance(image, Path) and not image.is_file() and not problem:
            problem = f"its first image {image} does not exist"
        result.append(dataclasses.replace(script, image=image, problem=problem))
    return result


def read_picture(image: Path | SourceShot, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """The first image of a script at `size` (height, width). Raises Unusable."""
    if isinstance(image, SourceShot):
        return read_frames(image, [0], size)[0]
    try:
        return to_uint8(read_image(image, size))
    except UserError as error:
        raise Unusable(str(error)) from error
