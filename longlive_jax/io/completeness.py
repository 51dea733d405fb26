"""Checks that a checkpoint directory has all parts that a command needs, before anything long.

The parts are the components "dit", "vae" and "umt5", and the tokenizer. Only the manifest and the
tokenizer are read, unless `check_arrays` is called.
"""

import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from longlive_jax.io.checkpoint import TOKENIZER, open_component, read_manifest
from longlive_jax.models.umt5 import Tokenizer
from longlive_jax.spec import UserError

__all__ = ["PARTS", "check_arrays", "describe_missing", "missing_parts", "require_components"]

PARTS = {"vae": "VAE", "umt5": "text encoder", TOKENIZER: "tokenizer", "dit": "DiT"}
"""Everything that sampling needs, with its name in messages."""
STAGES = {"vae": "vae", "umt5": "text", TOKENIZER: "text", "dit": "ar"}
"""Training stages of the small world that make the parts."""


def require_components(folder: str | os.PathLike, *names: str) -> dict[str, Any]:
    """The manifest of a checkpoint that has these parts (by default all), which fit together.

    Raises UserError, naming the part and a command that makes it, if one is missing or damaged, or
    if the widths of two parts differ.
    """
    folder, needed = Path(folder), names or tuple(PARTS)
    manifest = read_manifest(folder)
    missing = missing_parts(folder, needed)
    if missing:
        raise UserError(f"{folder}: {_describe(folder, manifest, missing)}")
    for name in needed:
        if name != TOKENIZER:
            open_component(folder, name)  # its arrays must be listed, and its folder exist
    _check_widths(folder, {name: manifest["components"].get(name, {}) for name in needed})
    return manifest


def missing_parts(folder: str | os.PathLike, names: Iterable[str] = PARTS) -> tuple[str, ...]:
    """Those of the named parts that a checkpoint directory lacks, in the order of `PARTS`."""
    components = read_manifest(folder)["components"]
    has_tokenizer = (Path(folder) / TOKENIZER).is_file()
    have = set(components) | ({TOKENIZER} if has_tokenizer else set())
    return tuple(name for name in PARTS if name in set(names) - have)


def describe_missing(folder: str | os.PathLike) -> str:
    """What a checkpoint lacks for sampling and which commands make it; empty if nothing."""
    missing = missing_parts(folder)
    return _describe(Path(folder), read_manifest(folder), missing) if missing else ""


def check_arrays(folder: str | os.PathLike, *names: str) -> None:
    """Reads all arrays of components and compares them with their checksums.

    Memory holds one array. Raises UserError for an array that is missing or damaged.
    """
    for name in names:
        reader, _ = open_component(folder, name)
        for path in reader.specs:
            reader.read(path)


def _describe(folder: Path, manifest: Mapping[str, Any], missing: Iterable[str]) -> str:
    """`has no VAE and no DiT yet; make them with ...`."""
    missing = tuple(missing)
    texts = " and ".join(f"no {PARTS[name]}" for name in missing)
    out = shlex.quote(str(folder))
    stages = {record.get("stage") for record in manifest["provenance"].values()}
    if stages & set(STAGES.values()):
        commands = [
            f"`longlive train --config=small_world:{stage} --workdir=DIR --out={out}`"
            for stage in dict.fromkeys(STAGES[name] for name in missing)
        ]
    else:
        commands = [f"`longlive convert --source=WEIGHTS --out={out}`"]
    pronoun = "it" if len(missing) == 1 else "them"
    return f"has {texts} yet; make {pronoun} with {', then '.join(commands)}"


def _check_widths(folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError if parts that both are given do not fit together."""
    dit, vae, umt5 = (settings.get(name, {}) for name in ("dit", "vae", "umt5"))
    pairs = (
        ("latent channels", dit.get("in_channels"), "VAE", vae.get("z_dim")),
        ("text features of width", dit.get("text_dim"), "text encoder", umt5.get("dim")),
    )
    for what, expected, part, width in pairs:
        if expected is not None and width is not None and expected != width:
            number = f"{expected} {what}" if what.startswith("latent") else f"{what} {expected}"
            raise UserError(
                f"{folder}: the DiT takes {number}, the {part} has {width}; convert the {part} of "
                "the same model with `longlive convert --overwrite`"
            )
    if TOKENIZER in settings and umt5.get("vocab_size") is not None:
        pieces = Tokenizer(folder / TOKENIZER).vocab_size
        if pieces > umt5["vocab_size"]:
            raise UserError(
                f"{folder}: {TOKENIZER} has {pieces} pieces, the text encoder embeds "
                f"{umt5['vocab_size']}; use the tokenizer of the same model"
            )
