"""Measures how often videos of the small world show what their held-out captions say.

A `VideoSource` turns descriptions into pixels: by rendering them (ground truth), by a round trip of
the rendering through the VAE, or by sampling from the captions alone. The same judge evaluates all
three, so the first two are upper bounds for the third: ground truth shows the judge's own error,
and reconstruction the VAE's.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.io.pictures import to_pixels, to_uint8
from longlive_jax.models.params import params_of, with_params
from longlive_jax.models.vae import VAE, decode_chunk, encode_chunk
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.script import Shot, ShotScript
from longlive_jax.small_world import (
    CHUNK_LATENTS,
    FPS,
    VideoSpec,
    frame_bounds,
    frame_count,
    parse_caption,
    render,
    sample_spec,
)
from longlive_jax.small_world.judge import VideoVerdict, judge_video
from longlive_jax.small_world.metrics import rate, summary
from longlive_jax.small_world.paired import outcomes
from longlive_jax.typing import Array, Params, UInt8

type VideoSource = Callable[[Sequence[VideoSpec], Sequence[int]], Iterable[np.ndarray]]
"""Maps b descriptions of equal length and b seeds to consecutive chunks of frames.

A chunk has shape [b, f, h, w, 3], and is uint8 or float in [-1, 1].
"""

type VideoProgress = Callable[[float, int], None]
"""Called with the number of finished videos, which may be fractional, and their total number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """A seeded set of held-out video descriptions to generate and judge.

    Attributes:
      least_shots: minimum number of shots; videos are added until it is reached and the last
        batch is full.
      chunks: chunks per video.
      shot_chunks: minimum and maximum chunks per shot.
      shots: minimum and maximum shots per video, sampled uniformly; None for any number that
        `shot_chunks` allows.
      cast: maximum number of distinct subjects per video; with fewer, they return more often.
      seed: seed of the descriptions and of the sampling noise.
    """

    least_shots: int = 200
    chunks: int = 18
    shot_chunks: tuple[int, int] = (3, 6)
    shots: tuple[int, int] | None = None
    cast: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.least_shots < 1 or self.chunks < 1:
            raise ValueError(
                f"least_shots and chunks must be >= 1, got {self.least_shots} and {self.chunks}"
            )

    def specs(self, batch: int) -> list[VideoSpec]:
        """The descriptions, in number a multiple of `batch`; deterministic for given settings."""
        rng = np.random.default_rng(self.seed)
        specs: list[VideoSpec] = []
        count = 0
        while count < self.least_shots or len(specs) % batch:
            shots = None if self.shots is None else int(rng.integers(*self.shots, endpoint=True))
            spec = sample_spec(
                rng,
                chunks=self.chunks,
                split="held_out",
                shot_chunks=self.shot_chunks,
                shots=shots,
                max_subjects=self.cast,
            )
            specs.append(spec)
            count += len(spec.shots)
        return specs


@dataclasses.dataclass(frozen=True)
class Example:
    """One judged video for visual inspection.

    Attributes:
      shots: frames of each shot.
      captions: caption of each shot.
    """

    shots: tuple[UInt8[np.ndarray, "f h w 3"], ...]
    captions: tuple[str, ...]


def script_of(spec: VideoSpec, seed: int = 0) -> ShotScript:
    """The shot script with the chunks, cuts and captions of `spec`."""
    return ShotScript(tuple(Shot(s.caption, chunks=s.chunks) for s in spec.shots), seed=seed)


def ground_truth(specs: Sequence[VideoSpec], _seeds: Sequence[int]) -> Iterator[np.ndarray]:
    """Video source that renders the descriptions; its accuracy is that of the judge."""
    yield np.stack([render(spec) for spec in specs])


class SampledVideos:
    """Video source that samples from the captions alone.

    Args:
      pipe: pipeline to sample with.
    """

    def __init__(self, pipe: Pipeline):
        self._pipe = pipe

    def __call__(self, specs: Sequence[VideoSpec], seeds: Sequence[int]) -> Iterator[np.ndarray]:
        scripts = [script_of(spec, seed) for spec, seed in zip(specs, seeds, strict=True)]
        for chunk in self._pipe.stream(scripts):
            yield chunk.frames


class VAEReconstruction:
    """Video source that passes the ground truth through the VAE, and records the pixel errors.

    Args:
      vae: autoencoder to evaluate.
    """

    def __init__(self, vae: VAE):
        graphdef = nnx.graphdef(vae)
        self._params = params_of(vae)
        self._first = vae.cfg.num_raw_frames(CHUNK_LATENTS)
        self._later = CHUNK_LATENTS * vae.cfg.temporal_stride

        @jax.jit
        def reconstruct(params: Params, frames: Array, tails: tuple):
            model = with_params(graphdef, params)
            latents, encoder = encode_chunk(model, frames, tails[0])
            pixels, decoder = decode_chunk(model, latents, tails[1])
            return jnp.clip(pixels, -1, 1), (encoder, decoder)

        self._reconstruct = reconstruct
        self.errors: list[np.ndarray] = []

    def __call__(self, specs: Sequence[VideoSpec], seeds: Sequence[int]) -> Iterator[np.ndarray]:
        for video in ground_truth(specs, seeds):
            tails: tuple = (None, None)
            for at in (0, *range(self._first, video.shape[1], self._later)):
                chunk = video[:, at : at + self._later if at else self._first]
                pixels, tails = self._reconstruct(self._params, chunk, tails)
                frames = np.asarray(pixels)
                self.errors.append(np.square(frames - chunk).mean((2, 3, 4)))
                yield frames

    def fidelity(self) -> dict[str, float]:
        """PSNR in dB over all pixels, and of the worst frame."""
        errors = np.concatenate([chunk.reshape(-1) for chunk in self.errors])
        return {"psnr": psnr_of_mse(errors.mean()), "psnr_worst_frame": psnr_of_mse(errors.max())}


def psnr_of_mse(mean_square: float) -> float:
    """Peak signal-to-noise ratio in dB, from the mean squared error of pixels in [-1, 1]."""
    return float(10 * np.log10(4 / max(float(mean_square), 1e-12)))


def measure(
    source: VideoSource,
    evaluation_set: EvaluationSet,
    *,
    batch: int,
    on_progress: VideoProgress | None = None,
) -> tuple[dict, Example]:
    """Generates and judges the videos of an evaluation set.

    Returns:
      The results, and the first video as an example. The results are those of `metrics.summary`,
      identity rates of returning subjects by first appearance (`returns`), the most frequent
      mistakes (`mistakes`), the outcomes of single shots (`outcomes`), the number of shots
      (`shots`), and durations (`times`).
    """
    specs = evaluation_set.specs(batch)
    frames = frame_count(evaluation_set.chunks)
    verdicts: list[VideoVerdict] = []
    examples: list[Example] = []
    generation: list[float] = []
    judging = 0.0

    def report_progress(num_generated: float) -> None:
        if on_progress is not None:
            on_progress(len(verdicts) / 2 + num_generated / 2, len(specs))

    for at, group in _batches(specs, batch):
        # 1. Generate a batch, chunk by chunk.
        start, chunks = time.perf_counter(), []
        for chunk in source(group, [evaluation_set.seed * 100_003 + at + i for i in range(batch)]):
            chunks.append(to_uint8(chunk))
            report_progress(at + batch * sum(c.shape[1] for c in chunks) / frames)
        videos = np.concatenate(chunks, axis=1)
        generated = time.perf_counter()
        # 2. Judge its videos.
        for spec, video in zip(group, videos, strict=True):
            verdicts.append(judge_video(to_pixels(video), spec.captions, frame_bounds(spec)))
            report_progress(at + batch)
        if not examples:
            examples.append(_example(videos[0], group[0]))
        generation.append(generated - start)
        judging += time.perf_counter() - generated
    times = _times(generation, judging, batch * frames)
    return {**_rates_and_counts(verdicts), "times": times}, examples[0]


def _rates_and_counts(verdicts: Sequence[VideoVerdict]) -> dict[str, Any]:
    """What `measure` returns of the verdicts."""
    return {
        **summary(verdicts),
        "returns": _returns(verdicts),
        "mistakes": _mistakes(verdicts),
        "outcomes": outcomes(verdicts),
        "shots": sum(len(verdict.shots) for verdict in verdicts),
    }


def _batches(specs: list[VideoSpec], batch: int) -> Iterator[tuple[int, list[VideoSpec]]]:
    for at in range(0, len(specs), batch):
        yield at, specs[at : at + batch]


def _example(frames: np.ndarray, spec: VideoSpec) -> Example:
    return Example(tuple(frames[start:stop] for start, stop in frame_bounds(spec)), spec.captions)


def _returns(verdicts: Sequence[VideoVerdict]) -> dict[str, dict]:
    """Rates at which returning subjects keep marker and size, by shot of first appearance.

    The first chunk of a video is the global sink, so only subjects of the first shot stay in the
    sampler's context throughout.
    """
    backs = [back for verdict in verdicts for back in verdict.returns]
    split = {
        "of_first_shot": [back for back in backs if back.first == 0],
        "of_later_shots": [back for back in backs if back.first > 0],
    }
    return {
        name: {
            "mark": rate(sum(back.same_marker for back in group), len(group)),
            "size": rate(sum(back.same_size for back in group), len(group)),
        }
        for name, group in split.items()
    }


def _mistakes(verdicts: Sequence[VideoVerdict], most: int = 10) -> dict[str, int]:
    """Counts of the `most` frequent mistakes, keyed "attribute: observed for expected"."""
    counts: Counter[str] = Counter()
    for shot in (shot for verdict in verdicts for shot in verdict.shots):
        scene = parse_caption(shot.caption)
        for kind, correct in shot.correct.items():
            if not correct:
                expected, observed = getattr(scene, kind), shot.observed[kind] or "nothing clear"
                counts[f"{kind}: {observed} for {expected}"] += 1
    return dict(counts.most_common(most))


def _times(generation: list[float], judging: float, frames: int) -> dict:
    """Durations in seconds, and frames per second without the first batch, which compiles."""
    later = generation[1:]
    return {
        "first_batch": round(generation[0], 2),
        "all_batches": round(sum(generation), 2),
        "judging": round(judging, 2),
        "frames_per_second": round(len(later) * frames / sum(later), 1) if later else None,
        "video_seconds": round(len(generation) * frames / FPS, 1),
    }
