"""The checkpoint directory: one Orbax tree per component, one manifest, a tokenizer.

    DIR/longlive.json          format, settings, array fingerprints and provenance per component
    DIR/{dit,vae,umt5,...}/    parameters as Orbax trees (see `arrays`), readable with Orbax alone
    DIR/tokenizer.model        SentencePiece model of the text encoder

Writes are atomic: components go into temporary folders, which are renamed at the end.
"""

import dataclasses
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from longlive_jax.io.arrays import ArrayReader, ArraySpec, ArrayWriter, TreePath, flatten, nest
from longlive_jax.spec import UserError, nearest

__all__ = [
    "CHECKPOINT_MANIFEST",
    "TOKENIZER",
    "CheckpointWriter",
    "is_packed_array",
    "load_component",
    "open_component",
    "read_manifest",
    "save_component",
    "weights_fingerprint",
]

CHECKPOINT_FORMAT = 1
CHECKPOINT_MANIFEST = "longlive.json"
TOKENIZER = "tokenizer.model"
QUANTIZATION_KEY = "quantization"
"""Manifest key: how each component is packed (see `packed_kernels`)."""
PACKED_ARRAYS = ("codes", "scales", "amax", "a", "b")
"""Names of a packed kernel's arrays, below the kernel's path."""


def is_packed_array(path: TreePath) -> bool:
    """Whether an array belongs to a packed kernel: its dtype is fixed, no cast applies to it."""
    return path[-2:-1] == ("kernel",) and path[-1] in PACKED_ARRAYS


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a checkpoint directory.

    Raises UserError if the directory or its manifest is missing, damaged, or of another format.
    """
    folder = Path(folder)
    path = folder / CHECKPOINT_MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint directory; check the path")
    if not path.is_file():
        raise UserError(
            f"{folder}: not a longlive-jax checkpoint ({CHECKPOINT_MANIFEST} is missing); make one "
            f"with `longlive convert --source={folder} --out=DIR`"
        )
    # A valid manifest of this format.
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); convert the checkpoint again"
        ) from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path}: format must be {CHECKPOINT_FORMAT}, got {version!r}; convert the checkpoint "
            "again"
        )
    if not all(isinstance(manifest.get(k), dict) for k in ("components", "arrays", "provenance")):
        raise UserError(
            f"{path}: incomplete, it needs components, arrays and provenance; convert the "
            "checkpoint again"
        )
    return manifest


def weights_fingerprint(folder: str | os.PathLike, *components: str) -> str:
    """The CRC-32 (8 hex digits) over the array fingerprints of a checkpoint directory.

    Covers the given `components`, or all of them if none is given.
    """
    arrays = read_manifest(folder)["arrays"]
    selected = {k: v for k, v in arrays.items() if not components or k in components}
    return f"{zlib.crc32(json.dumps(selected, sort_keys=True).encode()):08x}"


class CheckpointWriter:
    """Writes components into temporary folders, and renames them all in `commit`.

    Use as a context manager: leaving it without `commit` removes everything that was written.

    Args:
      folder: checkpoint directory, which may exist; components are added to it.
      overwrite: replace components that the directory already has.

    Raises UserError if the directory holds files but is not a checkpoint.
    """

    def __init__(self, folder: str | os.PathLike, *, overwrite: bool = False):
        self.folder = Path(folder)
        self.overwrite = overwrite
        self._existed = self.folder.is_dir()
        self._staged: dict[str, Path] = {}
        self._array_writers: list[ArrayWriter] = []
        is_foreign = self._existed and any(self.folder.iterdir()) and not self._is_checkpoint()
        if is_foreign:
            raise UserError(f"{self.folder}: holds other files; choose an empty or new folder")
        self.manifest: dict[str, Any] = {
            "format": CHECKPOINT_FORMAT,
            "components": {},
            "arrays": {},
            "provenance": {},
        }
        if self._is_checkpoint():
            self.manifest = read_manifest(self.folder)

    def _is_checkpoint(self) -> bool:
        return (self.folder / CHECKPOINT_MANIFEST).is_file()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        for staged in self._staged.values():
            shutil.rmtree(staged, ignore_errors=True)
            staged.unlink(missing_ok=True) if staged.is_file() else None
        if not self._existed and self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def stage(self, name: str) -> Path:
        """A temporary path that `commit` renames to `name`.

        Raises UserError if `name` exists (without `overwrite`) or the folder is not writable.
        """
        if (self.folder / name).exists() and not self.overwrite:
            raise UserError(f"{self.folder / name} exists; pass --overwrite to replace it")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written ({error.strerror}); choose another folder"
            ) from error
        self._staged[name] = self.folder / f".{name}.writing-{os.getpid()}"
        shutil.rmtree(self._staged[name], ignore_errors=True)
        return self._staged[name]

    def add_component(
        self,
        name: str,
        specs: Mapping[TreePath, ArraySpec],
        config: Any,
        *,
        provenance: Mapping[str, Any] | None = None,
        quantization: Any = None,
    ) -> ArrayWriter:
        """A writer for the arrays of a new component; the caller writes each of them.

        Args:
          name: component name.
          specs: shape and dtype of every array, by path.
          config: settings: a dataclass or a mapping.
          provenance: source of the weights, for the manifest.
          quantization: record of the packed kernels (`QuantizationRecord`), if there are any.
        """
        array_writer = ArrayWriter(self.stage(name), specs)
        self._array_writers.append(array_writer)
        self.manifest["components"][name] = _jsonable(config)
        self.manifest["arrays"][name] = array_writer.fingerprints
        self.manifest["provenance"][name] = dict(provenance or {})
        self.manifest.get(QUANTIZATION_KEY, {}).pop(name, None)
        if quantization is not None:
            self.manifest.setdefault(QUANTIZATION_KEY, {})[name] = _jsonable(quantization)
        return array_writer

    def add_tokenizer(self, source: Path) -> None:
        """Copies a SentencePiece model."""
        shutil.copyfile(source, self.stage(TOKENIZER))

    def commit(self) -> None:
        """Renames everything to its final name, the manifest last.

        Raises ValueError if an array was never written.
        """
        # 1. Every array must be complete.
        for name, arrays in self.manifest["arrays"].items():
            unwritten = [path for path, fingerprint in arrays.items() if not fingerprint]
            if unwritten:
                raise ValueError(f"{name}: arrays never written: {', '.join(unwritten[:8])}")
        for array_writer in self._array_writers:
            array_writer.flush()
        # 2. Components and tokenizer.
        for name, staged in self._staged.items():
            target = self.folder / name
            if target.is_dir():
                shutil.rmtree(target)
            staged.replace(target)
        self._staged.clear()
        # 3. Manifest.
        text = json.dumps(self.manifest, indent=1) + "\n"
        temporary = self.folder / f".{CHECKPOINT_MANIFEST}.writing-{os.getpid()}"
        temporary.write_text(text)
        temporary.replace(self.folder / CHECKPOINT_MANIFEST)


def save_component(
    folder: str | os.PathLike,
    name: str,
    params: Mapping[Any, Any],
    config: Any,
    *,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Adds a component, given as nested dictionaries of arrays and its settings, to a directory.

    Atomic. Raises UserError if the component exists and `overwrite` is False, or if the folder
    holds files but is not a checkpoint.
    """
    flat = flatten(params)
    specs = {path: ArraySpec(tuple(x.shape), np.dtype(x.dtype)) for path, x in flat.items()}
    with CheckpointWriter(folder, overwrite=overwrite) as writer:
        array_writer = writer.add_component(name, specs, config, provenance=provenance)
        for path, value in flat.items():
            array_writer.write(path, [np.asarray(value)], stacked=False)
        writer.commit()


def open_component(folder: str | os.PathLike, name: str) -> tuple[ArrayReader, dict[str, Any]]:
    """A reader of a component's arrays, and the component's settings.

    Raises UserError if the component is missing or the directory is not a checkpoint.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if name not in manifest["components"] or name not in manifest["arrays"]:
        raise UserError(
            f"{folder}: has no component {name!r}{nearest(name, manifest['components'])}"
        )
    if not (folder / name).is_dir():
        raise UserError(
            f"{folder}: incomplete, the folder {name!r} is missing; convert the checkpoint again"
        )
    return ArrayReader(folder / name, manifest["arrays"][name]), manifest["components"][name]


def load_component(
    folder: str | os.PathLike,
    name: str,
    *,
    dtype: DTypeLike | None = None,
    put: Callable[[TreePath, np.ndarray], jax.Array] | None = None,
) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Parameters in nested dictionaries of JAX arrays, and the component's settings.

    Every array is verified against its fingerprint. Arrays are read and verified while earlier ones
    are placed; an array that has the right dtype is not copied on the host, and on CPUs its memory
    becomes the parameter's.

    Args:
      folder: checkpoint directory.
      name: component name.
      dtype: dtype of floating-point arrays, except those of packed kernels; as stored if None.
      put: function that moves an array, given its path, to a device; the default device if None.

    Raises UserError if the directory is missing, not a checkpoint, or damaged.
    """
    reader, config = open_component(folder, name)
    params: dict[TreePath, jax.Array] = {}
    for path, value in reader.read_many(reader.specs):
        can_cast = jnp.issubdtype(value.dtype, jnp.floating) and not is_packed_array(path)
        if dtype is not None and can_cast:
            value = value.astype(dtype, copy=False)
        # `value` has no other owner, so a device may use its memory.
        params[path] = jax.device_put(value, may_alias=True) if put is None else put(path, value)
    return nest(params), config


def _jsonable(config: Any) -> Any:
    """Dataclasses as dictionaries, tuples as lists, dtypes as their names."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = dataclasses.fields(config)
        return {f.name: _jsonable(getattr(config, f.name)) for f in fields}
    if isinstance(config, Mapping):
        return {str(k): _jsonable(v) for k, v in config.items()}
    if isinstance(config, list | tuple):
        return [_jsonable(v) for v in config]
    if config is None or isinstance(config, str | int | float | bool):
        return config
    return np.dtype(config).name
