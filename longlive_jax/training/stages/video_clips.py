"""Clips for stage `clips` from a folder of videos, without a separate `longlive data encode`.

The videos are encoded once, by the base checkpoint's VAE and text encoder, into the work directory.
Encoding resumes after an interruption, and a later run with the same settings finds the clips.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longlive_jax.data.clips.clip_plan import JoinSpec
from longlive_jax.data.clips.dataset import find_samples, usable
from longlive_jax.data.clips.encode_spec import EncodeSpec
from longlive_jax.data.clips.encoders import checkpoint_encoders
from longlive_jax.data.clips.encoding import encode_dataset, resumable
from longlive_jax.data.clips.store import EncodedClips
from longlive_jax.io.checkpoint import TOKENIZER, read_manifest
from longlive_jax.models.umt5 import Tokenizer
from longlive_jax.parallel.hosts import is_first_process
from longlive_jax.sampling.settings import precision, spec_for
from longlive_jax.spec import UserError, build

__all__ = ["CutSpec", "clip_notes", "encoded_videos"]

FOLDER = "clips"
"""Folder of the encoded clips in the work directory."""
MAX_PROMPTS = 10_000
"""Prompts that are searched for unknown words."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutSpec:
    """How videos are cut into clips of equal length, when they are encoded for training.

    Attributes:
      size: height and width in pixels; None: the size that the base checkpoint is sampled with.
      chunks: chunks per clip.
      windows: clips per video, one after the other; 0 for as many as fit.
      max_chunks_per_shot: chunks after which one second of the shot is skipped; 0 for no limit.
      pad: whether to use videos that are too short, by repeating the last frame.
      single_shot: whether a clip stays within one shot.
    """

    size: tuple[int, int] | None = None
    chunks: int = 2
    windows: int = 0
    max_chunks_per_shot: int = 0
    pad: bool = True
    single_shot: bool = False

    def encode_spec(self, checkpoint: Path) -> EncodeSpec:
        """What to encode, with the chunk length and the prompts of a checkpoint directory."""
        own = spec_for(checkpoint)
        settings = {
            "join": {
                "chunks": self.chunks,
                "chunk_frames": own.chunk_frames,
                "max_chunks_per_shot": self.max_chunks_per_shot,
                "pad": self.pad,
                "single_shot": self.single_shot,
                "cut_prefix": own.cut_prefix,
            },
            "size": self.size or own.size,
            "windows": self.windows,
            "text_len": read_manifest(checkpoint)["components"]["dit"]["text_len"],
        }
        return build(EncodeSpec, settings, path="config.cut")

    def clip_shape(self, checkpoint: Path) -> tuple[JoinSpec, tuple[int, int]]:
        """Joining rules, and height and width in pixels, of the clips of a checkpoint."""
        spec = self.encode_spec(checkpoint)
        return spec.join, spec.size


def encoded_videos(videos: str, cut: CutSpec, checkpoint: Path, workdir: Path) -> EncodedClips:
    """The clips of a dataset of videos, encoded into `workdir` unless they are there already.

    In a run of several processes the first one encodes. Raises UserError for a folder that is not
    a dataset, or if none of its videos can be used.
    """
    out = workdir / FOLDER
    if is_first_process():
        spec = cut.encode_spec(checkpoint)
        encoders = checkpoint_encoders(checkpoint, spec, dtype=precision("auto"))
        samples = find_samples(videos)
        usable(samples, videos)
        try:
            with resumable(out), _Bars() as bars:
                encode_dataset(samples, out, spec=spec, encoders=encoders, progress=bars.update)
        except UserError as error:
            raise UserError(f"config.videos={videos}: {error}") from error
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("encoded")
    return EncodedClips(out)


class _Bars:
    """One progress bar on standard error for each kind of item."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bars = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> "_Bars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, kind: str, done: int, total: int) -> None:
        """Shows that `done` of `total` items of a kind are done."""
        if kind not in self._tasks:
            self._tasks[kind] = self._bars.add_task(f"encoding: {kind}", total=total)
        self._bars.update(self._tasks[kind], completed=done, total=total)


def clip_notes(clips: EncodedClips, checkpoint: Path) -> tuple[str, ...]:
    """Notes on videos that were left out, and on words that the text encoder does not know."""
    skipped = clips.manifest.skipped
    reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:4])
    left_out = (f"left out {len(skipped)} clips ({reasons})",) if skipped else ()
    prompts = (clips.prompt(row) for row in range(min(clips.num_prompts, MAX_PROMPTS)))
    unknown = Tokenizer(checkpoint / TOKENIZER).unknown_notes(prompts)
    return (*left_out, *(f"captions: {note}" for note in unknown))
