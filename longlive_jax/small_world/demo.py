"""Generation of the demo's files: a video, written while it is sampled, a strip and a report."""

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
from longlive_jax.small_world.demo_script import json_safe, judge, unknown_prompts, verdict_json
from longlive_jax.spec import UserError
from longlive_jax.typing import UInt8

SCALE = 6
"""Default enlargement of the video file; the judge reads the original frames."""


@dataclasses.dataclass(frozen=True)
class DemoFiles:
    """Paths of the demo's files.

    Attributes:
      video: enlarged video.
      strip: frames of each shot with its prompt.
      report: settings, durations and verdict as JSON.
    """

    video: Path
    strip: Path
    report: Path


@dataclasses.dataclass
class StageTimer:
    """Durations of consecutive stages.

    Attributes:
      stages: seconds per stage.
      at: time of the last lap, by `time.perf_counter`.
    """

    stages: dict[str, float] = dataclasses.field(default_factory=dict)
    at: float = dataclasses.field(default_factory=time.perf_counter)

    def lap(self, stage: str) -> None:
        """Adds the time since the last lap to `stage`."""
        now = time.perf_counter()
        self.stages[stage] = round(self.stages.get(stage, 0.0) + now - self.at, 3)
        self.at = now


def check_world(pipe: Pipeline) -> None:
    """Raises UserError unless the pipeline generates frames of the small world's size."""
    if tuple(pipe.spec.size) != (HEIGHT, WIDTH):
        raise UserError(
            f"the demo needs a small-world checkpoint of {HEIGHT}x{WIDTH} pixels, this one has "
            f"{pipe.spec.size[0]}x{pipe.spec.size[1]}; use `longlive sample` for it"
        )


def make_demo(
    pipe: Pipeline,
    script: ShotScript,
    out: Path,
    *,
    timer: StageTimer,
    scale: int = SCALE,
    on_chunk: Callable[[int], None] | None = None,
) -> tuple[DemoFiles, dict[str, Any]]:
    """Samples a script and writes video.mp4, strip.png and report.json into `out`.

    An interrupt leaves the finished chunks as a playable video.

    Args:
      pipe: small-world pipeline.
      script: shots to sample.
      out: output directory.
      timer: timer for the durations in the report.
      scale: enlargement of the video file.
      on_chunk: called with the number of frames of every finished chunk.

    Returns:
      The paths and the report.
    """
    files = DemoFiles(out / "video.mp4", out / "strip.png", out / "report.json")
    stream = _stream(pipe, script)
    chunks = _write_video(stream, files.video, pipe.spec.fps, scale, timer, on_chunk)
    frames = np.concatenate(chunks)
    bounds = list(itertools.pairwise([0, *stream.timeline.cut_frames(0), len(frames)]))
    prompts = [shot.prompt for shot in script.shots]
    strip(files.strip, [frames[start:stop] for start, stop in bounds], prompts)
    timer.lap("writing")
    verdict = judge(frames, prompts, bounds)
    timer.lap("judging")
    report = {
        **_facts(pipe, len(frames), len(chunks[0]), timer),
        "enlarged": scale,
        **_shots(script, bounds),
        "notes": list(stream.notes),
        "judge": verdict_json(verdict),
        "not_judged": unknown_prompts(prompts),
    }
    files.report.write_text(json.dumps(report, indent=1) + "\n")
    return files, report


def _stream(pipe: Pipeline, script: ShotScript) -> Stream:
    """A stream of the script, without its warnings: the report has the same notes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe.stream(script)


def _write_video(
    stream: Stream,
    path: Path,
    fps: float,
    scale: int,
    timer: StageTimer,
    on_chunk: Callable[[int], None] | None,
) -> list[UInt8[np.ndarray, "f h w 3"]]:
    """Samples the chunks of a stream and writes each when it is finished."""
    chunks = []
    with Mp4Writer(path, fps=fps) as video:
        for frames in _timed(stream, timer):
            chunks.append(frames)
            video.append(enlarge(frames, scale))
            timer.lap("writing")
            if on_chunk is not None:
                on_chunk(len(frames))
    return chunks


def _timed(stream: Stream, timer: StageTimer) -> Iterator[UInt8[np.ndarray, "f h w 3"]]:
    """Yields the chunks of a stream of one video, and times how long each takes."""
    stage = "first chunk, with compilation"
    for chunk in stream:
        timer.lap(stage)
        stage = "later chunks"
        yield chunk.frames[0]


def _facts(pipe: Pipeline, frames: int, first: int, timer: StageTimer) -> dict[str, Any]:
    """Length, settings and durations for the report; frames per second after the first chunk."""
    later = timer.stages.get("later chunks")
    return {
        "frames": frames,
        "seconds": round(frames / pipe.spec.fps, 2),
        "sampling": json_safe(dataclasses.asdict(pipe.spec)),
        "stages": dict(timer.stages),
        "frames_per_second": round((frames - first) / later, 1) if later else None,
    }


def _shots(script: ShotScript, bounds: list[tuple[int, int]]) -> dict[str, Any]:
    """Seed, and prompt and frame range of every shot, for the report; `end_frame` is exclusive."""
    return {
        "seed": script.seed,
        "shots": [
            {"prompt": shot.prompt, "first_frame": start, "end_frame": stop}
            for shot, (start, stop) in zip(script.shots, bounds, strict=True)
        ],
    }


def enlarge(frames: UInt8[np.ndarray, "f h w 3"], scale: int) -> UInt8[np.ndarray, "f H W 3"]:
    """Frames with every pixel repeated as a square of `scale` x `scale` pixels."""
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)
