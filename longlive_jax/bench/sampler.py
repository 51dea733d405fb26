"""Speed and memory of sampling, stage by stage, with any checkpoint.

Two passes. In the first, every stage of a chunk is waited for, so its time is its own. In the
second the video is streamed as users do, where decoding overlaps with the next chunk; that gives
frames per second. Whatever is compiled is compiled in the first pass.
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
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.script import Shot, ShotScript

PROMPTS = (
    "a red circle moves left on a white background",
    "a blue square moves up on a pink background",
    "a green cross stays still on a black background",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """How long a video is sampled, and how many at once; steps None: the checkpoint's own."""

    chunks: int = 40
    batch: int = 1
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.chunks < 6 or self.batch < 1:
            raise ValueError(
                f"chunks is {self.chunks} and batch {self.batch}; at least 6 chunks (three shots, "
                "the first of them compiling) and 1 video are needed"
            )


def bench_sampler(checkpoint: str | os.PathLike, spec: BenchSpec) -> dict[str, Any]:
    """Samples a video of three shots twice and returns what it cost, ready for JSON.

    Raises UserError for a missing, foreign or damaged checkpoint.
    """
    about, stages = machine(), Stages()
    steps = {} if spec.steps is None else {"steps": spec.steps}
    with Compilations() as compiled:
        pipe = stages.run("load", _loaded, checkpoint, steps)
        scripts = [_script(spec, seed) for seed in range(spec.batch)]
        frames = _apart(pipe, scripts, stages)
        before = Counter(compiled.counts)
        streamed = _streamed(pipe, scripts)
        again = dict(compiled.counts - before)
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
        "compilations": _own(compiled.counts),
        "compilations_of_second_video": _own(again),
        "peak": peak_memory(),
    }


def _loaded(checkpoint: str | os.PathLike, steps: dict[str, int]) -> Pipeline:
    pipe = Pipeline.from_checkpoint(checkpoint, **steps)
    jax.block_until_ready(pipe.params)
    return pipe


def _script(spec: BenchSpec, seed: int) -> ShotScript:
    each = spec.chunks // len(PROMPTS)
    lengths = [each, each, spec.chunks - 2 * each]
    shots = [Shot(p, chunks=n) for p, n in zip(PROMPTS, lengths, strict=True)]
    return ShotScript(tuple(shots), seed=seed)


def _apart(pipe: Pipeline, scripts: list[ShotScript], stages: Stages) -> int:
    """One stage at a time, each waited for; returns the frames of a chunk after the first."""
    laid, size = pipe.plan(scripts), pipe.size_of(scripts)
    negative = pipe.negative_prompts(scripts)
    for prompt in dict.fromkeys((*laid.distinct()[0], *negative)):
        stages.run("text", pipe.words, (prompt,))
    setting, cache = pipe.setting(scripts, size), pipe.cache(len(scripts), size)
    offsets, decode = laid.offsets(pipe.spec.shot_rope_offset), pipe.codec.decoder()
    frames = np.zeros((1, 0))
    with (
        tempfile.TemporaryDirectory() as folder,
        Mp4Writer(Path(folder) / "video.mp4", fps=pipe.spec.fps) as video,
    ):
        for k in range(laid.chunks):
            words = pipe.words((*(row[k] for row in laid.prompts), *negative))
            cut, shot_rope_offset = jnp.asarray(laid.cuts[:, k]), jnp.asarray(offsets[:, k])
            order = ChunkInputs(text=words, cut=cut, shot_rope_offset=shot_rope_offset)
            step = stages.run("chunk", pipe.sampler.step, pipe.params, cache, setting, order)
            latents, cache = step
            pixels, _ = stages.run("vae", decode, latents)
            frames = np.asarray(pixels)
            stages.run("write", video.append, frames[0])
    return frames.shape[1]


def _streamed(pipe: Pipeline, scripts: list[ShotScript]) -> dict[str, float]:
    """A whole video again, as a user streams it: seconds to the first chunk, frames per second."""
    begin = time.perf_counter()
    first, count = 0.0, 0
    for frames in pipe.stream(scripts):
        if not first:
            first = time.perf_counter()
        else:
            count += frames.shape[0] * frames.shape[1]
    speed = count / (time.perf_counter() - first)
    return {"first": round(first - begin, 4), "frames_per_second": round(speed, 1)}


def _own(counts: Counter[str] | dict[str, int]) -> dict[str, int]:
    """The functions of the model; the rest is single operations on the host's side."""
    names = ("_step", "_text", "_encode", "_bytes", "_latents", "_scan", "_remember")
    return {name: counts[name] for name in names if counts.get(name)}
