"""Makes the demo's files: the video as it is sampled, a strip of its frames, a report."""

import dataclasses
import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.io.pictures import strip
from longlive_jax.io.video import Mp4Writer
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.script import ShotScript
from longlive_jax.sampling.stream import Stream
from longlive_jax.small_world import HEIGHT, WIDTH
from longlive_jax.small_world.demo_script import as_json, judge, plain, strangers
from longlive_jax.spec import UserError
from longlive_jax.typing import UInt8

SCALE = 6
"""Enlargement of the video, for eyes; the judge reads the frames as they were made."""


@dataclasses.dataclass(frozen=True)
class Files:
    """Where everything was put."""

    video: Path
    strip: Path
    report: Path


@dataclasses.dataclass
class Clock:
    """Seconds of each stage; `lap` closes the stage that has been running since the last call."""

    stages: dict[str, float] = dataclasses.field(default_factory=dict)
    at: float = dataclasses.field(default_factory=time.perf_counter)

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.stages[stage] = round(self.stages.get(stage, 0.0) + now - self.at, 3)
        self.at = now


def check_world(pipe: Pipeline) -> None:
    """UserError unless the pipeline makes frames that the judge can read."""
    if tuple(pipe.spec.size) != (HEIGHT, WIDTH):
        raise UserError(
            f"the demo shows the small world, {HEIGHT}x{WIDTH} pixels; this checkpoint makes "
            f"{pipe.spec.size[0]}x{pipe.spec.size[1]}. Use `longlive sample` for it"
        )


def film(
    pipe: Pipeline,
    script: ShotScript,
    out: Path,
    *,
    clock: Clock,
    scale: int = SCALE,
    on_chunk: Callable[[int], None] | None = None,
) -> tuple[Files, dict[str, Any]]:
    """Samples `script` and writes video.mp4, strip.png and report.json into `out`.

    `on_chunk` hears of the frames of every chunk. Returns the paths and the report. An interrupt
    leaves the finished chunks as a playable video.
    """
    files = Files(out / "video.mp4", out / "strip.png", out / "report.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same remarks are in the report
        stream = pipe.stream(script)
    chunks: list[np.ndarray] = []
    with Mp4Writer(files.video, fps=pipe.spec.fps) as video:
        for frames in _timed(stream, clock):
            chunks.append(frames)
            video.append(enlarged(frames, scale))
            clock.lap("writing")
            if on_chunk is not None:
                on_chunk(len(frames))
    whole = np.concatenate(chunks)
    edges = [0, *stream.plan.cut_frames(0), len(whole)]
    bounds = list(itertools.pairwise(edges))
    prompts = [shot.prompt for shot in script.shots]
    strip(files.strip, [whole[start:stop] for start, stop in bounds], prompts)
    clock.lap("writing")
    verdict = judge(whole, prompts, bounds)
    clock.lap("judging")
    report = {
        **_facts(pipe, len(whole), len(chunks[0]), clock),
        "enlarged": scale,
        "seed": script.seed,
        "shots": [
            {"prompt": prompt, "first_frame": start, "end_frame": stop}
            for prompt, (start, stop) in zip(prompts, bounds, strict=True)
        ],
        "notes": list(stream.notes),
        "judge": as_json(verdict),
        "not_judged": strangers(prompts),
    }
    files.report.write_text(json.dumps(report, indent=1) + "\n")
    return files, report


def _timed(stream: Stream, clock: Clock) -> Iterator[UInt8[np.ndarray, "f h w 3"]]:
    """The chunks of the only video of a stream; the clock runs while one is waited for."""
    stage = "first chunk, with compilation"
    for frames in stream:
        clock.lap(stage)
        stage = "later chunks"
        yield frames[0]


def _facts(pipe: Pipeline, frames: int, first: int, clock: Clock) -> dict[str, Any]:
    """Length, settings and times; frames a second after the first chunk."""
    later = clock.stages.get("later chunks")
    return {
        "frames": frames,
        "seconds": round(frames / pipe.spec.fps, 2),
        "sampling": plain(dataclasses.asdict(pipe.spec)),
        "stages": dict(clock.stages),
        "frames_per_second": round((frames - first) / later, 1) if later else None,
    }


def enlarged(frames: UInt8[np.ndarray, "f h w 3"], scale: int) -> UInt8[np.ndarray, "f H W 3"]:
    """Every pixel as a square of `scale` by `scale`."""
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)
