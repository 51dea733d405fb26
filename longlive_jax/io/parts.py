"""Adds the parts of one checkpoint directory to another, without a second copy where possible."""

import dataclasses
import os
import shutil
from pathlib import Path

from longlive_jax.io.checkpoint import (
    CHECKPOINT_MANIFEST,
    TOKENIZER,
    CheckpointWriter,
    read_manifest,
)
from longlive_jax.spec import Failure, UserError

__all__ = ["MODELS_FILE", "SETTINGS_FILE", "AddedParts", "add_parts", "parts_to_add"]

SETTINGS_FILE = "longlive_sampling.json"
"""File of an exported checkpoint with its sampling settings."""
MODELS_FILE = "longlive_models.json"
"""File of an exported checkpoint with settings of its models that neither the weights nor their
config.json tell, by component."""

_COPIED_SECTIONS = ("components", "arrays", "provenance")


@dataclasses.dataclass
class AddedParts:
    """The parts that were added, and how.

    Attributes:
      names: component names, and the tokenizer's file name.
      linked: bytes of files that are hard links to those of the source.
      copied: bytes of files that were copied, because links were not possible.
    """

    names: tuple[str, ...] = ()
    linked: int = 0
    copied: int = 0

    def __str__(self) -> str:
        sizes = ((self.linked, "hard links"), (self.copied, "copies"))
        texts = [f"{size / 1e6:,.1f} MB as {kind}" for size, kind in sizes if size]
        return f"{', '.join(self.names)} ({', '.join(texts)})"


def parts_to_add(source: Path, out: Path, *, without: str) -> tuple[str, ...]:
    """The parts of `source`, except the component `without`, that the directory `out` lacks.

    Raises UserError if `out` has another version of one of them.
    """
    own = read_manifest(source)
    names = [name for name in own["components"] if name != without]
    names += [TOKENIZER] * (source / TOKENIZER).is_file()
    if out.resolve() == source.resolve():
        return ()
    if not (out / CHECKPOINT_MANIFEST).is_file():
        return tuple(names)
    theirs, missing = read_manifest(out), []
    for name in names:
        if name == TOKENIZER:
            exists = (out / name).is_file()
            same = exists and (out / name).read_bytes() == (source / name).read_bytes()
        else:
            exists = name in theirs["components"]
            same = exists and all(
                theirs[section].get(name) == own[section].get(name)
                for section in ("components", "arrays")
            )
        if exists and not same:
            raise UserError(
                f"{out}: its {name} is not that of {source}; choose another folder for --out"
            )
        missing += [] if exists else [name]
    return tuple(missing)


def add_parts(writer: CheckpointWriter, source: Path, names: tuple[str, ...]) -> AddedParts:
    """Stages parts of the checkpoint directory `source` in a writer: hard links, else copies.

    Raises Failure if they cannot be written.
    """
    added, manifest = AddedParts(names), read_manifest(source)
    for name in names:
        try:
            _add(source / name, writer.stage(name), added)
        except OSError as error:
            raise Failure(
                f"{writer.folder / name}: cannot be written ({error.strerror or error}); free some "
                "space and run the same command again"
            ) from error
        if name != TOKENIZER:
            for section in _COPIED_SECTIONS:
                writer.manifest[section][name] = manifest[section].get(name, {})
    return added


def _add(source: Path, target: Path, added: AddedParts) -> None:
    """Links or copies a file, or all files of a folder."""
    if source.is_dir():
        target.mkdir()
        for path in sorted(source.iterdir()):
            _add(path, target / path.name, added)
        return
    size = source.stat().st_size
    try:
        os.link(source.resolve(), target)
        added.linked += size
    except OSError:  # another file system, or one without links: a copy serves as well
        shutil.copyfile(source, target)
        added.copied += size
