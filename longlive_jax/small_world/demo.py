"""Generation of the demo's files: a video, written while it is sampled, a strip and a report."""

import contextlib
import dataclasses
import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.io.pictures import add_caption, enlarge
from longlive_jax.io.video import GifWriter
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.record import file_tags, video_record
from longlive_jax.sampling.recorder import Recorder
from longlive_jax.sampling.script import ShotScript
from longlive_jax.sampling.stream import Chunk, Stream
from longlive_jax.small_world import HEIGHT, WIDTH
from longlive_jax.small_world.demo_script import json_safe, judge, unknown_prompts, verdict_json
from longlive_jax.spec import UserError
from longlive_jax.typing import UInt8

GIF_SCALE = 4
"""Enlargement of the captioned GIF: 256 pixels, small enough to be shown on a web page."""

GIF_COLOURS = 64
"""Colours of each shot of the GIF: the world has few, and their mixtures at edges."""


@dataclasses.dataclass(frozen=True)
class DemoFiles:
    """Paths of the demo's files.

    Attributes:
      video: enlarged video.
      strip: frames of each shot with its prompt.
      report: settings, durations and verdict as JSON.
      gif: looping video with captions below, or None.
    """

    video: Path
    strip: Path
    report: Path
    gif: Path | None = None


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


@dataclasses.dataclass(frozen=True)
class DemoHooks:
    """Calls of the demo's user.

    Attributes:
      on_chunk: called with the number of frames of every finished chunk.
      wait: wraps the iterator of chunks.
      finish: closes the recorder, also after an interrupt.
    """

    on_chunk: Callable[[int], None] = lambda _: None
    wait: Callable[[Iterator[Chunk]], Iterator[Chunk]] = iter
    finish: Callable[[Recorder], None] = Recorder.close


NO_HOOKS = DemoHooks()


def make_demo(
    pipe: Pipeline,
    script: ShotScript,
    out: Path,
    *,
    timer: StageTimer,
    run: Mapping[str, Any] | None = None,
    scale: int | None = None,
    gif: bool = False,
    hooks: DemoHooks = NO_HOOKS,
) -> tuple[DemoFiles, dict[str, Any]]:
    """Samples a script and writes video.mp4, strip.png, video.json and report.json into `out`.

    An interrupt leaves the finished chunks as a playable video. Returns the paths and the report.

    Args:
      pipe: small-world pipeline.
      script: shots to sample.
      out: output directory.
      timer: timer for the durations in the report.
      run: what video.json says of the run (`record.run_record`); None writes no record.
      scale: enlargement of the video file; None for the default.
      gif: also write video.gif, with captions under the frames.
      hooks: progress and interruption.
    """
    # 1. Sample, and write each chunk when it is finished.
    stream = _stream(pipe, script)
    record = video_record(run or {}, script, (HEIGHT, WIDTH), notes=stream.notes)
    records = None if run is None else [record]
    recorder = Recorder(out, stream.timeline, ["video"], scale=scale, records=records)
    chunks = _sample(stream, recorder, timer, hooks)
    # 2. The other files.
    video = recorder.videos[0]
    files = DemoFiles(
        video.path, video.strip_path, out / "report.json", out / "video.gif" if gif else None
    )
    bounds = list(itertools.pairwise([0, *stream.timeline.cut_frames(0), video.frames]))
    if files.gif is not None:
        _write_gif(files.gif, np.concatenate(chunks), bounds, script, file_tags(record))
        timer.lap("writing")
    report = _report(pipe, script, chunks, bounds, timer)
    report |= {"enlarged": video.scale, "notes": list(stream.notes)}
    files.report.write_text(json.dumps(report, indent=1) + "\n")
    return files, report


def _report(
    pipe: Pipeline,
    script: ShotScript,
    chunks: list[UInt8[np.ndarray, "f h w 3"]],
    bounds: list[tuple[int, int]],
    timer: StageTimer,
) -> dict[str, Any]:
    """Settings, durations and verdict."""
    frames, prompts = np.concatenate(chunks), [shot.prompt for shot in script.shots]
    verdict = judge(frames, prompts, bounds)
    timer.lap("judging")
    return {
        **_facts(pipe, len(frames), len(chunks[0]), timer),
        **_shots(script, bounds),
        "judge": verdict_json(verdict),
        "not_judged": unknown_prompts(prompts),
    }


def _stream(pipe: Pipeline, script: ShotScript) -> Stream:
    """A stream of the script, without its warnings: the report has the same notes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe.stream(script)


def _sample(
    stream: Stream, recorder: Recorder, timer: StageTimer, hooks: DemoHooks
) -> list[UInt8[np.ndarray, "f h w 3"]]:
    """Records the chunks of one video, times them, and returns their frames."""
    chunks, stage = [], "first chunk, with compilation"
    with contextlib.closing(stream):
        try:
            for chunk in hooks.wait(stream):
                timer.lap(stage)
                stage = "later chunks"
                recorder.append(chunk)
                chunks.append(chunk.frames[0])
                timer.lap("writing")
                hooks.on_chunk(len(chunk.frames[0]))
        finally:
            hooks.finish(recorder)
    return chunks


def _write_gif(
    path: Path,
    frames: UInt8[np.ndarray, "f h w 3"],
    bounds: list[tuple[int, int]],
    script: ShotScript,
    tags: Mapping[str, str],
) -> None:
    """Writes the frames of each shot above its prompt, as a looping GIF."""
    with GifWriter(path, metadata=tags, colours=GIF_COLOURS) as gif:
        for (start, stop), shot in zip(bounds, script.shots, strict=True):
            gif.append(add_caption(enlarge(frames[start:stop], GIF_SCALE), shot.prompt))


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
