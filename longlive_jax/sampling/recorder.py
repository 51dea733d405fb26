"""Files of videos in the making: MP4 written chunk by chunk, a strip of stills, latents."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.io.paths import check_writable
from longlive_jax.io.pictures import strip
from longlive_jax.io.video import Mp4Writer
from longlive_jax.sampling.timeline import Plan
from longlive_jax.typing import Array, Float, UInt8

STRIP_ROWS = 60
"""A strip shows so many segments; a video of hours has more than a picture can hold."""


def segments(plan: Plan, video: int, *, prefix: str = CUT_PREFIX) -> list[tuple[int, int, str]]:
    """(first frame, end, prompt) of every stretch of one video without a cut or another prompt."""
    starts: list[tuple[int, str]] = []
    for chunk in range(int(plan.lengths[video])):
        prompt = plan.prompts[video][chunk].removeprefix(prefix)
        if not starts or plan.cuts[video, chunk] or prompt != starts[-1][1]:
            starts.append((plan.frames(chunk), prompt))
    ends = [*(at for at, _ in starts[1:]), plan.frames(int(plan.lengths[video]))]
    return [(at, end, prompt) for (at, prompt), end in zip(starts, ends, strict=True)]


def file_name(name: str, number: int, many: bool) -> str:
    """`video`, or for one of many videos its name (letters, digits, `._-`) and number."""
    if not many:
        return "video"
    plain = re.sub(r"[^\w.-]+", "_", name).strip("._")[:60]
    return f"{number:03d}-{plain}" if plain else f"{number:03d}"


class Take:
    """The files of one video. What was appended is kept however the program ends."""

    def __init__(
        self, folder: Path, name: str, plan: Plan, video: int, *, stills: int, latents: bool
    ):
        self.path = folder / f"{name}.mp4"
        self.strip_path = folder / ("strip.png" if name == "video" else f"{name}.strip.png")
        self.latents_path = folder / f"{name}.latents.npy"
        self.frames = 0
        self._writer = Mp4Writer(self.path, fps=plan.fps)
        self._length = plan.frames(int(plan.lengths[video]))
        self._chunks = int(plan.lengths[video])
        self._latents: list[np.ndarray] | None = [] if latents else None
        self._rows = segments(plan, video)[:STRIP_ROWS] if stills else []
        self._picks = [
            np.unique(np.linspace(a, b - 1, stills).astype(int)) for a, b, _ in self._rows
        ]
        self._stills: list[list[np.ndarray]] = [[] for _ in self._rows]

    def append(
        self, frames: UInt8[np.ndarray, "f h w 3"], latents: Float[Array, "f h w c"] | None
    ) -> None:
        """Writes the frames of the next chunk, as far as they belong to this video."""
        frames = frames[: self._length - self.frames]
        if not len(frames):
            return
        for kept, picks in zip(self._stills, self._picks, strict=True):
            kept += [
                frames[i - self.frames].copy() for i in picks if 0 <= i - self.frames < len(frames)
            ]
        if self._latents is not None and latents is not None:
            self._latents.append(np.asarray(latents))
        self._writer.append(frames)
        self.frames += len(frames)

    def close(self) -> None:
        """Finishes all files; without any frames there are none."""
        self._writer.close()
        if self._latents:
            np.save(self.latents_path, np.concatenate(self._latents))
        rows = [(kept, row[2]) for kept, row in zip(self._stills, self._rows, strict=True) if kept]
        if rows:
            shots, captions = zip(*rows, strict=True)
            strip(self.strip_path, [np.stack(shot) for shot in shots], captions)


class Recording:
    """Takes of all videos of a batch; a context manager that always closes them."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        names: Sequence[str],
        *,
        stills: int = 8,
        latents: bool = False,
    ):
        check_writable(folder)
        self.takes = [
            Take(folder, name, plan, i, stills=stills, latents=latents)
            for i, name in enumerate(names)
        ]

    def append(
        self,
        frames: UInt8[np.ndarray, "b f h w 3"],
        latents: Float[Array, "b f h w c"] | None = None,
    ) -> None:
        """Adds a chunk of every video."""
        for i, take in enumerate(self.takes):
            take.append(frames[i], None if latents is None else latents[i])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for take in self.takes:
            take.close()
