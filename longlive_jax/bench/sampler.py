"""Speed and memory of sampling, stage by stage, with any checkpoint.

Two passes. The first waits for every stage of a chunk, so that each stage has its own time. The
second streams the video as users do, where decoding overlaps with the next chunk; it gives frames
per second. Everything compiles in the first pass.
"""

import dataclasses
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.bench.timing import Compilations, Stages, machine, peak_memory
from longlive_jax.io.video import Mp4Writer
from longlive_jax.sampling.drivers import ChunkInputs
from longlive_jax.sampling.engine import Engine
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.script import Shot, ShotScript

PROMPTS = (
    "a red circle moves left on a white background",
    "a blue square moves up on a pink background",
    "a green cross stays still on a black background",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """Size of the benchmark.

    Attributes:
      chunks: chunks per video.
      batch: videos sampled together.
      steps: sampler steps per chunk; None uses the checkpoint's own.
    """

    chunks: int = 40
    batch: int = 1
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.chunks < 6 or self.batch < 1:
            raise ValueError(
                f"chunks must be >= 6 (three shots, of which the first compiles) and batch >= 1, "
                f"got {self.chunks} and {self.batch}"
            )


def bench_sampler(checkpoint: str | os.PathLike, spec: BenchSpec) -> dict[str, Any]:
    """Samples a video of three shots twice; returns times, memory and compilations as JSON.

    Raises UserError for a missing, foreign or damaged checkpoint.
    """
    # 1. Two passes over the same video.
    about, stages = machine(), Stages()
    steps = {} if spec.steps is None else {"steps": spec.steps}
    with Compilations() as compiled:
        pipe = stages.run("load", _load, checkpoint, steps)
        scripts = [_script(spec, seed) for seed in range(spec.batch)]
        frames = _time_stages(pipe.engine, scripts, stages)
        before = Counter(compiled.counts)
        streamed = _time_stream(pipe, scripts)
        again = dict(compiled.counts - before)
    # 2. The report.
    first = {k: round(stages.seconds[k][0], 4) for k in ("text", "chunk", "vae", "write")}
    steady = {k: round(stages.median(k, skip=2), 5) for k in ("text", "chunk", "vae", "write")}
    return {
        "machine": about,
        "checkpoint": str(checkpoint),
        "spec": {**dataclasses.asdict(spec), "sample": dataclasses.asdict(pipe.spec)},
        "seconds": {
            "load": round(stages.total("load"), 3),
            "compile": round(compiled.seconds, 3),
            "text": steady["text"],
            "first_chunk": first["chunk"],
            "steady_chunk": steady["chunk"],
            "vae": steady["vae"],
            "write": steady["write"],
            "first_text": first["text"],
            "first_vae": first["vae"],
        },
        "frames_per_chunk": frames,
        "frames_per_second": {
            "dit": round(spec.batch * frames / steady["chunk"], 1),
            "vae": round(spec.batch * frames / steady["vae"], 1),
            "all": streamed["frames_per_second"],
        },
        "first_chunk_of_second_video": streamed["first"],
        "compilations": _model_functions(compiled.counts),
        "compilations_of_second_video": _model_functions(again),
        "peak": peak_memory(),
    }


def _load(checkpoint: str | os.PathLike, steps: dict[str, Any]) -> Pipeline:
    pipe = Pipeline.from_checkpoint(checkpoint, **steps)
    jax.block_until_ready(pipe.engine.params)
    return pipe


def _script(spec: BenchSpec, seed: int) -> ShotScript:
    """Three shots; the last one takes the remaining chunks."""
    each = spec.chunks // len(PROMPTS)
    lengths = [each, each, spec.chunks - 2 * each]
    shots = [Shot(p, chunks=n) for p, n in zip(PROMPTS, lengths, strict=True)]
    return ShotScript(tuple(shots), seed=seed)


def _time_stages(engine: Engine, scripts: list[ShotScript], stages: Stages) -> int:
    """Runs one stage at a time, waiting for each; returns the frames of a chunk after the first."""
    timeline, size = engine.timeline(scripts), engine.size_of(scripts)
    negative = engine.negative_prompts(scripts)
    # 1. Prompts.
    for prompt in dict.fromkeys((*timeline.distinct_prompts()[0], *negative)):
        stages.run("text", engine.text_kv, (prompt,))
    # 2. Chunks: sampled, decoded and written.
    conditioning = engine.conditioning(scripts, size)
    cache, decoder = engine.start(conditioning)
    offsets = timeline.shot_rope_offsets(engine.spec.shot_rope_offset)
    frames = np.zeros((1, 0))
    with (
        tempfile.TemporaryDirectory() as folder,
        Mp4Writer(Path(folder) / "video.mp4", fps=engine.spec.fps) as video,
    ):
        for k in range(timeline.num_chunks):
            inputs = ChunkInputs(
                text=engine.text_kv((*(row[k] for row in timeline.prompts), *negative)),
                cut=jnp.asarray(timeline.cuts[:, k]),
                shot_rope_offset=jnp.asarray(offsets[:, k]),
            )
            latents, cache = stages.run("chunk", engine.step, cache, conditioning, inputs)
            pixels, _, decoder = stages.run("vae", engine.decode, decoder, latents)
            frames = np.asarray(pixels)
            stages.run("write", video.append, frames[0])
    return frames.shape[1]


def _time_stream(pipe: Pipeline, scripts: list[ShotScript]) -> dict[str, float]:
    """Streams the video as a user does: seconds to the first chunk, frames per second after it."""
    begin = time.perf_counter()
    first, count = 0.0, 0
    for chunk in pipe.stream(scripts):
        if not first:
            first = time.perf_counter()
        else:
            count += chunk.frames.shape[0] * chunk.frames.shape[1]
    speed = count / (time.perf_counter() - first)
    return {"first": round(first - begin, 4), "frames_per_second": round(speed, 1)}


REPORT_KEYS = {
    "_step": "_step",
    "_text": "_text",
    "_encode": "_encode",
    "_decode_frames": "_bytes",
    "_encode_pixels": "_latents",
    "_scan": "_scan",
    "_write_context": "_remember",
}
"""Compiled functions of the model -> their keys in the report."""


def _model_functions(counts: Counter[str] | dict[str, int]) -> dict[str, int]:
    """Compilations of the model's functions; the others are single operations."""
    return {key: counts[name] for name, key in REPORT_KEYS.items() if counts.get(name)}
