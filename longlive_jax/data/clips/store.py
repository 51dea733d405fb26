"""Stores of encoded clips: files on disk that are read back as training samples.

    DIR/manifest.json                    settings, models, and the list of shards (see `Manifest`)
    DIR/clips-00000.array_record ...     one record per clip
    DIR/scripts-00000.array_record ...   one record per script, in stores without clips
    DIR/texts-00000.array_record ...     one record per distinct prompt, in sorted order
    DIR/parts/00000012                   clips of shards that are not complete yet

The format of a record is that of `records.pack_record`. A clip refers to its prompts by their row
in the store, so a prompt that many clips have in common is stored once, without padding.
"""

import bisect
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
from longlive_jax.data.clips.records import unpack_record
from longlive_jax.spec import UserError, with_renamed
from longlive_jax.typing import Float

__all__ = [
    "EncodedClips",
    "Manifest",
    "Shard",
    "is_complete",
    "with_shard",
    "write_file",
    "write_shard",
]

FORMAT = 1
"""Version of the manifest's format."""

STORE_MANIFEST = "manifest.json"

RENAMED_FIELDS = {"chunk": "chunk_frames", "ratio": "temporal_stride"}
"""Fields of `JoinSpec` in the manifests of earlier versions, and their names now."""

AGAIN = "run the same `longlive data encode` again"
"""Remedy for a store that is incomplete or damaged."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of records.

    Attributes:
      file: name of the file.
      records: number of records; without any, there is no file.
      skipped: (sample, reason) of each clip that the shard lacks.
    """

    file: str
    records: int
    skipped: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of a store. All field names are stored in its file.

    Attributes:
      identity: everything that determines the records: the fields of `EncodeSpec`, and fingerprints
        of the models and of the dataset. Encoding resumes only if it is equal.
      versions: versions of the libraries that encoded the store.
      texts: complete shards of prompts.
      clips: complete shards of clips.
      scripts: complete shards of scripts.
      unplanned: samples without a clip, and why.
      texts_per_clip: largest number of distinct prompts in one clip.
      shots_per_script: largest number of shots in one script.
      complete: whether all shards are written.
    """

    identity: dict[str, Any]
    versions: dict[str, str]
    texts: tuple[Shard, ...] = ()
    clips: tuple[Shard, ...] = ()
    scripts: tuple[Shard, ...] = ()
    unplanned: tuple[tuple[str, str], ...] = ()
    texts_per_clip: int = 1
    shots_per_script: int = 0
    complete: bool = False

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Samples that lack one or all of their clips, and why."""
        shards = (*self.clips, *self.scripts)
        return [*self.unplanned, *(entry for shard in shards for entry in shard.skipped)]

    def summary(self) -> str:
        """The numbers of clips or scripts, prompts, and what was skipped."""
        kinds = {"clips": self.clips, "prompts": self.texts}
        if "scripts" in self.identity:
            kinds = {"scripts": self.scripts, "prompts": self.texts}
        counts = [f"{sum(s.records for s in shards)} {name}" for name, shards in kinds.items()]
        skipped = [f"{len(self.skipped)} skipped"] * bool(self.skipped)
        return ", ".join([*counts, *skipped])

    def write(self, folder: Path) -> None:
        """Writes the manifest of a store, or replaces it."""
        values = {"format": FORMAT} | dataclasses.asdict(self)
        write_file(folder / STORE_MANIFEST, (json.dumps(values, indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads the manifest of a store, also those of versions that named fields differently.

        Raises UserError if it is missing, damaged, or in another format.
        """
        path = folder / STORE_MANIFEST
        try:
            values = json.loads(path.read_text())
            version = values.pop("format")
            if version != FORMAT:
                raise UserError(
                    f"{path}: format must be {FORMAT}, got {version!r}; remove {folder} and encode "
                    "the dataset again"
                )
            # Convert JSON lists to tuples, and old field names to new ones.
            values["identity"]["join"] = with_renamed(values["identity"]["join"], RENAMED_FIELDS)
            for name in ("texts", "clips", "scripts"):
                shards = values.get(name, ())  # earlier versions had no scripts
                values[name] = tuple(
                    Shard(s["file"], s["records"], _pairs(s["skipped"])) for s in shards
                )
            return cls(**values | {"unplanned": _pairs(values["unplanned"])})
        except FileNotFoundError as error:
            raise UserError(
                f"{folder}: no encoded clips ({STORE_MANIFEST} is missing); encode them with "
                f"`longlive data encode --out={folder}` (prompts alone: --texts_only or --scripts)"
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
    """Writes a file atomically: under a temporary name, synced to disk, then renamed."""
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
    """Writes an ArrayRecord file atomically, and returns its number of records.

    Without records, no file is written. Raises OSError if writing fails (ArrayRecord itself raises
    RuntimeError).
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


def with_shard(shards: tuple[Shard, ...], number: int, shard: Shard) -> tuple[Shard, ...]:
    """`shards` with the given one at index `number`."""
    return (*shards[:number], shard, *shards[number + 1 :])


def is_complete(folder: Path, shard: Shard) -> bool:
    """Whether a shard's file exists and has all its records, whose contents are not checked."""
    try:
        return not shard.records or len(_source([folder / shard.file])) == shard.records
    except (RuntimeError, OSError, ValueError):
        return False


def _source(files: Sequence[Path]) -> Any:
    return grain.sources.ArrayRecordDataSource([str(file) for file in files])


def _summary(error: Exception) -> str:
    """The first line of an error's message, shortened."""
    return str(error).partition("\n")[0][:160]


class EncodedClips:
    """The clips of a store by index: `clips[i]` is a `ClipLatents`; a `loader.ClipSource`.

    A store of prompts alone has length 0. `encoders.check_encoded_by` checks which models encoded
    it. Raises UserError for a store that is missing, incomplete, or damaged.

    Attributes:
      folder: the store's folder.
      manifest: its manifest.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        if not self.manifest.complete:
            raise UserError(f"{folder}: its encoding has not finished; {AGAIN} to resume it")
        self._clips = self._open(self.manifest.clips)
        self._texts = self._open(self.manifest.texts)
        self._scripts = self._open(self.manifest.scripts)

    def _open(self, shards: tuple[Shard, ...]) -> Any:
        """The records of all shards by index; an empty tuple if there are none."""
        files = [shard for shard in shards if shard.records]
        if not files:
            return ()
        expected = sum(shard.records for shard in files)
        try:
            source = _source([self.folder / shard.file for shard in files])
            problem = "" if len(source) == expected else f"{len(source)} of {expected} records"
        except (RuntimeError, OSError, ValueError) as error:
            problem = _summary(error)
        if problem:
            raise UserError(
                f"{self.folder}: missing or damaged files ({problem}); {AGAIN} to replace them"
            )
        return source

    def __len__(self) -> int:
        return len(self._clips)

    def name(self, index: int) -> str:
        """A clip's name, for messages."""
        return f"clip {index} of {self.folder.name}"

    def __getitem__(self, index: int) -> ClipLatents:
        """One clip. Raises Unusable if its record, or that of one of its prompts, is damaged."""
        arrays, _ = self._record(self._clips, index)
        text_features = np.stack([self.text_features(int(row)) for row in arrays.pop("texts")])
        return ClipLatents(**arrays, text_features=text_features)

    def text_features(self, row: int) -> Float[np.ndarray, "t e"]:
        """Text features of a prompt, padded with zeros. Raises Unusable if they are damaged."""
        arrays, _ = self._record(self._texts, row)
        features = arrays["features"]
        padded = np.zeros((self.manifest.identity["text_len"], features.shape[1]), features.dtype)
        padded[: len(features)] = features
        return padded

    def prompt(self, row: int) -> str:
        """A prompt; rows are sorted by prompt. Raises Unusable if its record is damaged."""
        return self._record(self._texts, row)[1]["prompt"]

    @property
    def num_prompts(self) -> int:
        """Number of distinct prompts."""
        return len(self._texts)

    def row(self, prompt: str) -> int | None:
        """Row of a prompt, by binary search; None if the store does not have it.

        Raises Unusable for a damaged record.
        """
        row = bisect.bisect_left(range(self.num_prompts), prompt, key=self.prompt)
        return row if row < self.num_prompts and self.prompt(row) == prompt else None

    @property
    def num_scripts(self) -> int:
        """Number of scripts."""
        return len(self._scripts)

    def script(self, index: int) -> tuple[dict[str, np.ndarray], str]:
        """Arrays of a script (see `script_records`), and its name.

        Raises Unusable if its record is damaged.
        """
        arrays, meta = self._record(self._scripts, index)
        return arrays, meta["name"]

    @property
    def empty_text_features(self) -> Float[np.ndarray, "t e"]:
        """Text features of the empty prompt, for text dropout and guidance.

        Raises UserError if they are damaged.
        """
        try:
            return self.text_features(0)  # it sorts first
        except (Unusable, IndexError) as error:
            file = self.folder / (self.manifest.texts[0].file if self.manifest.texts else "")
            raise UserError(
                f"{file}: the empty prompt is unreadable ({error}); remove that file and {AGAIN} "
                "to replace it"
            ) from error

    @property
    def negative_text_features(self) -> Float[np.ndarray, "t e"]:
        """Text features of the negative prompt.

        Raises UserError for a store without one, or if they are damaged.
        """
        prompt = self.manifest.identity.get("negative_prompt")
        try:
            row = None if prompt is None else self.row(prompt)
            if row is not None:
                return self.text_features(row)
        except Unusable as reason:
            raise UserError(
                f"{self.folder}: its negative prompt is unreadable ({reason})"
            ) from reason
        raise UserError(
            f"{self.folder}: has no negative prompt; encode the prompts into another folder with "
            "`longlive data encode --texts_only --negative_prompt=TEXT`"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """(frames, height, width, channels) of every clip's latents.

        Raises UserError if no clip can be read.
        """
        return self._first[0]

    @property
    def chunks(self) -> int:
        """Chunks per clip. Raises UserError if no clip can be read."""
        return self._first[1]

    @functools.cached_property
    def _first(self) -> tuple[tuple[int, ...], int]:
        """Latent shape and number of chunks of the first clip that can be read."""
        if not len(self):
            raise UserError(
                f"{self.folder}: has prompts but no clips; encode clips into another folder, "
                "without --texts_only"
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
            f"folder and {AGAIN}"
        )

    def read(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Reads one clip as a row, padded to `texts_per_clip` prompts. `rng` is not used."""
        del rng
        return self[index].row(self.manifest.texts_per_clip)

    def _record(self, source: Any, index: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        try:
            return unpack_record(source[index])
        except (RuntimeError, OSError) as error:
            raise Unusable(f"damaged record ({_summary(error)})") from error
