"""The options of `longlive data encode` for scripts without videos, and where they come from."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlive_jax.cli.app import Parser
from longlive_jax.spec import UserError

if TYPE_CHECKING:
    from longlive_jax.data.clips.clip_plan import JoinSpec
    from longlive_jax.data.clips.scripts import PromptScript
    from longlive_jax.data.clips.store import Manifest
    from longlive_jax.sampling.script import ShotScript

type EncodeJob = Callable[..., "Manifest"]
"""`job(out, spec=..., encoders=..., progress=...)`: encodes a dataset."""

OWN = "own"
"""`--first_images=own`: the image of each script, or the first frame of each video."""


def add_script_options(parser: Parser) -> None:
    """Adds the options for encoding scripts."""
    add = parser.add_argument
    add(
        "--texts_only",
        action="store_true",
        help="encode no clips, but all prompts a clip could have and the captions as scripts (for "
        "training on videos, or on prompts alone)",
    )
    add(
        "--scripts",
        type=Path,
        help="scripts in place of --source and --texts_only: a .jsonl with a video per line, "
        '{"shots": [{"caption": TEXT, "chunks": N}, ...]}, a .txt with a prompt per line, or a '
        "script or caption folder as for `sample`",
    )
    add(
        "--negative_prompt",
        metavar="TEXT",
        help="negative prompt of the scripts (default: the checkpoint's)",
    )
    add(
        "--first_images",
        metavar="FOLDER",
        help="also encode a first image for every script: NAME.png from this folder; own: its "
        "own image, or the first frame of its video",
    )


def check_script_options(args: Any) -> None:
    """UserError for options that do not go together; `--scripts` implies `--texts_only`."""
    if (args.source is None) == (args.scripts is None):
        raise UserError(
            "data encode: give either --source=DATASET, or --scripts=FILE for prompts without "
            "videos"
        )
    args.texts_only = args.texts_only or args.scripts is not None
    if args.mesh is not None and args.texts_only:
        raise UserError(
            "--mesh shards clips, but --texts_only and --scripts encode none; remove one of them"
        )
    for name in ("negative_prompt", "first_images"):
        if getattr(args, name) is not None and not args.texts_only:
            raise UserError(f"--{name} belongs to scripts; add --texts_only")


def find_scripts(args: Any, join: "JoinSpec") -> "list[PromptScript]":
    """The scripts to encode, with first images if these are asked for.

    Durations in seconds become chunks of `join`, at the checkpoint's frame rate.

    Raises UserError for files and folders that are not what they should be.
    """
    from longlive_jax.data.clips.dataset import find_samples
    from longlive_jax.data.clips.scripts import pictures_by_name, sample_scripts, with_pictures
    from longlive_jax.sampling.settings import spec_for

    if args.scripts is None:
        scripts = sample_scripts(find_samples(args.source))
    else:
        scripts = _read_scripts(args.scripts, join, spec_for(args.checkpoint).fps)
    if args.first_images is None:
        return scripts
    own = args.first_images == OWN
    return with_pictures(scripts, None if own else pictures_by_name(Path(args.first_images)))


def script_job(args: Any, scripts: "list[PromptScript]") -> EncodeJob:
    """The job that encodes these scripts."""
    from longlive_jax.data.clips.encoding import encode_scripts
    from longlive_jax.sampling.settings import spec_for

    negative = args.negative_prompt
    if negative is None:
        negative = spec_for(args.checkpoint).negative_prompt
    return functools.partial(
        encode_scripts,
        scripts,
        negative_prompt=negative,
        first_images=args.first_images is not None,
    )


def _read_scripts(path: Path, join: "JoinSpec", fps: float) -> "list[PromptScript]":
    """The scripts of a file or folder."""
    from longlive_jax.data.clips.scripts import read_script_lines
    from longlive_jax.sampling.script import read_scripts

    if path.suffix.lower() == ".jsonl":
        if not path.is_file():
            raise UserError(f"no scripts at {path}; check the path")
        return read_script_lines(path)
    # Text files have no durations, nor do folders without this file; these numbers are dropped.
    timed = {file.parent.name for file in path.rglob("shot_durations.txt")}
    chunks = {"chunks_per_shot": 1} if path.is_dir() else {"chunks": 1}
    chunk_seconds = join.chunk_frames * join.temporal_stride / fps
    is_timed = path.suffix.lower() != ".txt"
    return [
        _prompt_script(
            script, chunk_seconds if is_timed and (path.is_file() or script.name in timed) else None
        )
        for script in read_scripts(path, **chunks)
    ]


def _prompt_script(script: "ShotScript", chunk_seconds: float | None) -> "PromptScript":
    """A script for `data encode`; without durations if `chunk_seconds` is None."""
    from longlive_jax.data.clips.scripts import PromptScript, ScriptShot

    shots = tuple(
        ScriptShot(
            shot.prompt,
            None if chunk_seconds is None else shot.length(chunk_seconds),
            shot.cut is not False,
        )
        for shot in script.shots
    )
    return PromptScript(script.name, shots, None if script.image is None else Path(script.image))
