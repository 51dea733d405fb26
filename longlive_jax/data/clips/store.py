"""Encoded clips on disk, read back as training samples.

    DIR/manifest.json                    what was encoded how, and the shards (see `Manifest`)
    DIR/clips-00000.array_record ...     a record a clip
    DIR/texts-00000.array_record ...     a record a distinct prompt, in sorted order
    DIR/parts/00000012                   clips of shards that are not full yet

A record is what `records.pack` makes. A clip names its prompts by their place in the store, so a
prompt that a thousand clips share is stored once, and without the zeros behind its tokens.
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from longlive_jax.data.clips.dataset import Unusable
from longlive_jax.data.clips.latents import ClipLatents
from longlive_jax.data.clips.records import unpack
from longlive_jax.spec import UserError, with_renamed
from longlive_jax.typing import Float

__all__ = ["EncodedClips", "Manifest", "Shard", "holds", "write_file", "write_shard"]

FORMAT = 1
MANIFEST = "manifest.json"
RENAMED = {"chunk": "chunk_frames", "ratio": "temporal_stride"}
"""Joining rules in stores of earlier versions, and their names today."""
REMOVE = "remove that file and run the same `longlive data encode` again, it makes it anew"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records, and what of its share of the jobs it lacks: (sample, reason)."""

    file: str
    records: int
    skipped: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Attributes:
      identity: all that decides what the records are: sizes, joining rules, types, fingerprints of
        the models and of the dataset. Encoding resumes only if it is the same.
      versions: of the libraries that encoded.
      texts, clips: shards that are finished.
      unplanned: samples that no clip was planned for, and why.
      texts_per_clip: most distinct prompts of one clip.
      complete: all shards are there.
    """

    identity: dict[str, Any]
    versions: dict[str, str]
    texts: tuple[Shard, ...] = ()
    clips: tuple[Shard, ...] = ()
    unplanned: tuple[tuple[str, str], ...] = ()
    texts_per_clip: int = 1
    complete: bool = False

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Samples that are not in the store, or not with all their clips, and why."""
        return [*self.unplanned, *(one for shard in self.clips for one in shard.skipped)]

    def write(self, folder: Path) -> None:
        """Puts it in the place of the one before."""
        values = {"format": FORMAT} | dataclasses.asdict(self)
        write_file(folder / MANIFEST, (json.dumps(values, indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """UserError if it is missing, damaged, or of another format."""
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text())
            version = values.pop("format")
            if version != FORMAT:
                raise UserError(
                    f"{path}: format {version!r}, and this version reads format {FORMAT}; remove "
                    f"{folder} and encode the dataset again"
                )
            values["identity"]["join"] = with_renamed(values["identity"]["join"], RENAMED)
            for name in ("texts", "clips"):
                shards = values[name]
                values[name] = tuple(
                    Shard(s["file"], s["records"], _pairs(s["skipped"])) for s in shards
                )
            return cls(**values | {"unplanned": _pairs(values["unplanned"])})
        except FileNotFoundError as error:
            raise UserError(
                f"{folder}: no encoded clips ({MANIFEST} is missing); make them with "
                f"`longlive data encode --out={folder}`"
            ) from error
        except UserError:
            raise
        except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
            raise UserError(
                f"{path}: damaged ({error}); remove {folder} and encode the dataset again"
            ) from error


def _pairs(values: Iterable[Any]) -> tuple[tuple[str, str], ...]:
    return tuple((name, reason) for name, reason in values)


def write_file(path: Path, content: bytes) -> None:
    """Writes under a temporary name, makes sure that it is on disk, and renames."""
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(path: Path, records: Iterable[bytes]) -> int:
    """Writes an ArrayRecord file, whole or not at all, and counts its records.

    Raises OSError if it cannot be written (ArrayRecord itself raises RuntimeError).
    """
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    written = 0
    try:
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        with contextlib.closing(writer):
            for record in records:
                writer.write(record)
                written += 1
        if written:
            temporary.replace(path)
    except RuntimeError as error:
        raise OSError(f"{path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return written


def holds(folder: Path, shard: Shard) -> bool:
    """Whether a shard's file is there with all its records; what is in them is not looked at."""
    try:
        return not shard.records or len(_source([folder / shard.file])) == shard.records
    except (RuntimeError, OSError, ValueError):
        return False


def _source(files: Sequence[Path]) -> Any:
    return grain.sources.ArrayRecordDataSource([str(file) for file in files])


def _why(error: Exception) -> str:
    """The first line of an error, shortened."""
    return str(error).partition("\n")[0][:160]


class EncodedClips:
    """The clips of a store by index: `clips[i]` is a `ClipLatents`; also a `feed.Source`.

    A store may have texts alone: then its length is 0. Raises UserError for a store that is
    missing, unfinished, or damaged. Whether it was made by the models of a checkpoint is for
    `encoders.check_made_by`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        if not self.manifest.complete:
            raise UserError(
                f"{folder}: its encoding has not finished; run the same `longlive data encode` "
                "again, it goes on where it stopped"
            )
        self._clips = self._open(self.manifest.clips)
        self._texts = self._open(self.manifest.texts)

    def _open(self, shards: tuple[Shard, ...]) -> Any:
        held = [shard for shard in shards if shard.records]
        if not held:
            return ()
        wanted = sum(shard.records for shard in held)
        try:
            source = _source([self.folder / shard.file for shard in held])
            lacking = "" if len(source) == wanted else f"{len(source)} records, {wanted} written"
        except (RuntimeError, OSError, ValueError) as error:
            lacking = _why(error)
        if lacking:
            raise UserError(
                f"{self.folder}: missing or damaged files ({lacking}); run the same "
                "`longlive data encode` again, it makes them anew"
            )
        return source

    def __len__(self) -> int:
        return len(self._clips)

    def name(self, index: int) -> str:
        """What to call a clip in messages."""
        return f"clip {index} of {self.folder.name}"

    def __getitem__(self, index: int) -> ClipLatents:
        """One clip. Raises Unusable if its record, or one of its prompts', is damaged."""
        arrays, _ = self._record(self._clips, index)
        text = np.stack([self.text(int(row)) for row in arrays.pop("texts")])
        return ClipLatents(**arrays, text=text)

    def text(self, row: int) -> Float[np.ndarray, "t e"]:
        """Features of a prompt by its place in the store, filled up with zeros."""
        arrays, _ = self._record(self._texts, row)
        found = arrays["features"]
        padded = np.zeros((self.manifest.identity["text_len"], found.shape[1]), found.dtype)
        padded[: len(found)] = found
        return padded

    def prompt(self, row: int) -> str:
        """A prompt by its place; they are sorted. Unusable if its record is damaged."""
        return self._record(self._texts, row)[1]["prompt"]

    @property
    def texts(self) -> int:
        """How many prompts there are."""
        return len(self._texts)

    @property
    def empty(self) -> Float[np.ndarray, "t e"]:
        """Features of no prompt, for text dropout and guidance; UserError if they are damaged."""
        try:
            return self.text(0)  # it sorts first
        except (Unusable, IndexError) as error:
            file = self.folder / (self.manifest.texts[0].file if self.manifest.texts else "")
            raise UserError(
                f"{file}: the empty prompt is unreadable ({error}); {REMOVE}"
            ) from error

    @property
    def shape(self) -> tuple[int, ...]:
        """Frames, height, width and channels of every clip's latents; UserError if none is left."""
        return self._first[0]

    @property
    def chunks(self) -> int:
        """Chunks of every clip; UserError if none is left."""
        return self._first[1]

    @functools.cached_property
    def _first(self) -> tuple[tuple[int, ...], int]:
        """Shape and chunks of the first clip that can be read."""
        if not len(self):
            raise UserError(
                f"{self.folder}: has texts alone; encode clips into another folder, without "
                "--texts_only"
            )
        reasons = []
        for index in range(len(self)):
            try:
                arrays = self._record(self._clips, index)[0]
            except Unusable as reason:
                reasons.append(reason)
                continue
            return arrays["latents"].shape, len(arrays["cut"])
        raise UserError(
            f"{self.folder}: none of its {len(self)} clips can be read ({reasons[0]}); remove the "
            "folder and run the same `longlive data encode` again"
        )

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`ClipLatents.row` with room for as many texts as any clip has; nothing is random."""
        del rng
        return self[index].row(self.manifest.texts_per_clip)

    def _record(self, source: Any, index: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        try:
            return unpack(source[index])
        except (RuntimeError, OSError) as error:
            raise Unusable(f"damaged record ({_why(error)})") from error
