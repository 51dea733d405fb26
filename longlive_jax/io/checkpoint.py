"""The checkpoint directory: one Orbax tree per component, one manifest, a tokenizer.

    DIR/longlive.json          format, settings and fingerprints of the components, where from
    DIR/{dit,vae,umt5,...}/    parameters as Orbax trees (see `arrays`), readable by Orbax alone
    DIR/tokenizer.model        SentencePiece model of the text encoder

Components are written beside their places and moved there at the end: a whole one or none.
"""

import dataclasses
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from longlive_jax.io.arrays import ArrayFiller, ArrayReader, ArraySpec, Path, flatten, nest
from longlive_jax.spec import UserError, nearest

__all__ = [
    "CheckpointWriter",
    "is_part",
    "load_component",
    "open_component",
    "read_manifest",
    "save_component",
    "weights_of",
]

FORMAT = 1
MANIFEST = "longlive.json"
TOKENIZER = "tokenizer.model"
QUANTIZATION = "quantization"
"""Of the manifest: how components are packed (see `packed`)."""
PARTS = ("codes", "scales", "amax", "a", "b")
"""Arrays of a packed kernel, below its path."""


def is_part(path: Path) -> bool:
    """Whether an array is part of a packed kernel: its type is no choice."""
    return path[-2:-1] == ("kernel",) and path[-1] in PARTS


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a checkpoint directory; UserError if it is missing, damaged, or foreign."""
    folder = FilePath(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint directory")
    if not path.is_file():
        raise UserError(
            f"{folder}: no checkpoint of ours ({MANIFEST} is missing); make one with "
            f"`longlive convert --source={folder} --out=DIR`"
        )
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); convert the checkpoint again") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise UserError(f"{path}: format {version!r}; this version reads format {FORMAT}")
    if not all(isinstance(manifest.get(k), dict) for k in ("components", "arrays", "provenance")):
        raise UserError(f"{path}: incomplete; convert the checkpoint again")
    return manifest


def weights_of(folder: str | os.PathLike, *components: str) -> str:
    """A fingerprint of the arrays of a checkpoint directory, all or those of some components."""
    arrays = read_manifest(folder)["arrays"]
    chosen = {k: v for k, v in arrays.items() if not components or k in components}
    return f"{zlib.crc32(json.dumps(chosen, sort_keys=True).encode()):08x}"


class CheckpointWriter:
    """Components written into temporary folders, which all take their places in `commit`.

    Used as a context manager: leaving without `commit` removes every trace.
    """

    def __init__(self, folder: str | os.PathLike, *, overwrite: bool = False):
        self.folder = FilePath(folder)
        self.overwrite = overwrite
        self._existed = self.folder.is_dir()
        self._staged: dict[str, FilePath] = {}
        self._fillers: list[ArrayFiller] = []
        foreign = self._existed and any(self.folder.iterdir()) and not self._own()
        if foreign:
            raise UserError(f"{self.folder}: holds other files; choose an empty or new folder")
        self.manifest: dict[str, Any] = {
            "format": FORMAT,
            "components": {},
            "arrays": {},
            "provenance": {},
        }
        if self._own():
            self.manifest = read_manifest(self.folder)

    def _own(self) -> bool:
        return (self.folder / MANIFEST).is_file()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        for staged in self._staged.values():
            shutil.rmtree(staged, ignore_errors=True)
            staged.unlink(missing_ok=True) if staged.is_file() else None
        if not self._existed and self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def stage(self, name: str) -> FilePath:
        """A temporary sibling that `commit` renames to `name`; UserError if `name` is taken."""
        if (self.folder / name).exists() and not self.overwrite:
            raise UserError(f"{self.folder / name} exists; say --overwrite to replace it")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror})") from error
        self._staged[name] = self.folder / f".{name}.writing-{os.getpid()}"
        shutil.rmtree(self._staged[name], ignore_errors=True)
        return self._staged[name]

    def component(
        self,
        name: str,
        specs: Mapping[Path, ArraySpec],
        config: Any,
        *,
        provenance: Mapping[str, Any] | None = None,
        quantization: Any = None,
    ) -> ArrayFiller:
        """Lays out a component with zero-filled arrays; the caller fills each by path.

        `quantization`: the record of packed kernels, if there are any.
        """
        filler = ArrayFiller(self.stage(name), specs)
        self._fillers.append(filler)
        self.manifest["components"][name] = _jsonable(config)
        self.manifest["arrays"][name] = filler.fingerprints
        self.manifest["provenance"][name] = dict(provenance or {})
        self.manifest.get(QUANTIZATION, {}).pop(name, None)
        if quantization is not None:
            self.manifest.setdefault(QUANTIZATION, {})[name] = _jsonable(quantization)
        return filler

    def tokenizer(self, source: FilePath) -> None:
        """Copies a SentencePiece model."""
        shutil.copyfile(source, self.stage(TOKENIZER))

    def commit(self) -> None:
        """Puts everything in its place; the manifest comes last."""
        for name, arrays in self.manifest["arrays"].items():
            lacking = [path for path, print_ in arrays.items() if not print_]
            if lacking:
                raise ValueError(f"{name}: never filled: {', '.join(lacking[:8])}")
        for filler in self._fillers:
            filler.flush()
        for name, staged in self._staged.items():
            target = self.folder / name
            if target.is_dir():
                shutil.rmtree(target)
            staged.replace(target)
        self._staged.clear()
        text = json.dumps(self.manifest, indent=1) + "\n"
        temporary = self.folder / f".{MANIFEST}.writing-{os.getpid()}"
        temporary.write_text(text)
        temporary.replace(self.folder / MANIFEST)


def save_component(
    folder: str | os.PathLike,
    name: str,
    params: Mapping[Any, Any],
    config: Any,
    *,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Adds a component (nested dictionaries of arrays, and its settings) to a directory.

    Atomic. Raises UserError if the component exists (and `overwrite` is not given) or the folder
    holds something else.
    """
    flat = flatten(params)
    specs = {path: ArraySpec(tuple(x.shape), np.dtype(x.dtype)) for path, x in flat.items()}
    with CheckpointWriter(folder, overwrite=overwrite) as writer:
        filler = writer.component(name, specs, config, provenance=provenance)
        for path, value in flat.items():
            filler.fill(path, [np.asarray(value)], stacked=False)
        writer.commit()


def open_component(folder: str | os.PathLike, name: str) -> tuple[ArrayReader, dict[str, Any]]:
    """A reader of a component's arrays, and its settings; UserError if it is not there."""
    folder = FilePath(folder)
    manifest = read_manifest(folder)
    if name not in manifest["components"] or name not in manifest["arrays"]:
        raise UserError(
            f"{folder}: has no component {name!r}{nearest(name, manifest['components'])}"
        )
    if not (folder / name).is_dir():
        raise UserError(f"{folder}: incomplete, the folder {name!r} is gone; convert it again")
    return ArrayReader(folder / name, manifest["arrays"][name]), manifest["components"][name]


def load_component(
    folder: str | os.PathLike,
    name: str,
    *,
    dtype: DTypeLike | None = None,
    put: Callable[[Path, np.ndarray], jax.Array] = lambda _, value: jnp.asarray(value),
) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Parameters as JAX arrays in nested dictionaries, and the settings they were saved with.

    Every array is checked against its fingerprint. Floating-point arrays become `dtype` if given,
    parts of packed kernels excepted; one array at a time is on the host, and `put` places it.
    Raises UserError for a missing, foreign or damaged directory.
    """
    reader, config = open_component(folder, name)
    params: dict[Path, jax.Array] = {}
    for path in reader.specs:
        value = reader.read(path)
        floating = jnp.issubdtype(value.dtype, jnp.floating) and not is_part(path)
        if dtype is not None and floating:
            value = value.astype(dtype)
        params[path] = put(path, value)
    return nest(params), config


def _jsonable(config: Any) -> Any:
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = dataclasses.fields(config)
        return {f.name: _jsonable(getattr(config, f.name)) for f in fields}
    if isinstance(config, Mapping):
        return {str(k): _jsonable(v) for k, v in config.items()}
    if isinstance(config, list | tuple):
        return [_jsonable(v) for v in config]
    if config is None or isinstance(config, str | int | float | bool):
        return config
    return np.dtype(config).name  # element types
