"""How often sampled videos of the small world show what their captions say.

Captions are combinations of attributes that training never showed. A `Film` turns descriptions of
videos into pixels: by drawing them, by drawing and reconstructing them with the VAE, or by
sampling them from their captions alone. All three are judged alike, so the first two are the
ceilings of the third: what the judge gets wrong, and what the VAE loses.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

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
from longlive_jax.small_world.judge import VideoVerdict, judge_video, summary, wilson
from longlive_jax.typing import Array, Params, UInt8

type Film = Callable[[Sequence[VideoSpec], Sequence[int]], Iterable[np.ndarray]]
"""Videos of equal length with their seeds, to consecutive pieces `[b, f, h, w, 3]` of their frames,
uint8 or float in [-1, 1]."""

type Tick = Callable[[float, int], None]
"""Told how many videos are done, in parts of a video too, and out of how many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footage:
    """Held-out videos to be made and judged.

    Attributes:
      least_shots: as many videos are drawn as are needed for so many shots, then a batch is filled.
      chunks: length of every video.
      shot_chunks: fewest and most chunks of a shot.
      shots: fewest and most shots of a video, drawn evenly; None: whatever the lengths allow.
      cast: most subjects of a video; the fewer, the more often one returns.
      seed: of the descriptions and of the sampler's noise.
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
                f"least_shots {self.least_shots} and chunks {self.chunks} must be at least 1"
            )

    def specs(self, batch: int) -> list[VideoSpec]:
        """The descriptions, a whole number of batches; the same for the same settings."""
        rng = np.random.default_rng(self.seed)
        found: list[VideoSpec] = []
        count = 0
        while count < self.least_shots or len(found) % batch:
            shots = None if self.shots is None else int(rng.integers(*self.shots, endpoint=True))
            spec = sample_spec(
                rng,
                chunks=self.chunks,
                split="held_out",
                shot_chunks=self.shot_chunks,
                shots=shots,
                cast=self.cast,
            )
            found.append(spec)
            count += len(spec.shots)
        return found


@dataclasses.dataclass(frozen=True)
class Example:
    """One judged video, for looking at: its frames by shot, and what they should show."""

    shots: tuple[UInt8[np.ndarray, "f h w 3"], ...]
    captions: tuple[str, ...]


def script_of(spec: VideoSpec, seed: int = 0) -> ShotScript:
    """The script whose chunks, cuts and prompts are those of `spec`."""
    return ShotScript(tuple(Shot(s.caption, chunks=s.chunks) for s in spec.shots), seed=seed)


def truth(specs: Sequence[VideoSpec], _seeds: Sequence[int]) -> Iterator[np.ndarray]:
    """The film of what was meant: the judge's own ceiling."""
    yield np.stack([render(spec) for spec in specs])


class Sampled:
    """The film that a pipeline makes of the captions alone."""

    def __init__(self, pipe: Pipeline):
        self._pipe = pipe

    def __call__(self, specs: Sequence[VideoSpec], seeds: Sequence[int]) -> Iterator[np.ndarray]:
        scripts = [script_of(spec, seed) for spec, seed in zip(specs, seeds, strict=True)]
        yield from self._pipe.stream(scripts)


class Reconstruction:
    """The film after a round trip through the VAE, and how far its pixels are from the truth."""

    def __init__(self, vae: VAE):
        graphdef = nnx.graphdef(vae)
        self._params = params_of(vae)
        self._first = vae.cfg.num_raw_frames(CHUNK_LATENTS)
        self._later = CHUNK_LATENTS * vae.cfg.temporal_stride

        @jax.jit
        def again(params: Params, frames: Array, tails: tuple):
            model = with_params(graphdef, params)
            latents, encoder = encode_chunk(model, frames, tails[0])
            pixels, decoder = decode_chunk(model, latents, tails[1])
            return jnp.clip(pixels, -1, 1), (encoder, decoder)

        self._again = again
        self.errors: list[np.ndarray] = []

    def __call__(self, specs: Sequence[VideoSpec], seeds: Sequence[int]) -> Iterator[np.ndarray]:
        for video in truth(specs, seeds):
            tails: tuple = (None, None)
            for at in (0, *range(self._first, video.shape[1], self._later)):
                piece = video[:, at : at + self._later if at else self._first]
                pixels, tails = self._again(self._params, piece, tails)
                frames = np.asarray(pixels)
                self.errors.append(np.square(frames - piece).mean((2, 3, 4)))
                yield frames

    def fidelity(self) -> dict[str, float]:
        """Peak signal-to-noise ratios in dB: of all pixels together, and of the worst frame."""
        errors = np.concatenate([piece.reshape(-1) for piece in self.errors])
        return {"psnr": psnr(errors.mean()), "psnr_worst_frame": psnr(errors.max())}


def psnr(mean_square: float) -> float:
    """dB for a mean square error of pixels in [-1, 1], whose range is 2."""
    return float(10 * np.log10(4 / max(float(mean_square), 1e-12)))


def measure(
    film: Film, footage: Footage, *, batch: int, tick: Tick | None = None
) -> tuple[dict, Example]:
    """Makes and judges the footage.

    Returns:
      Rates and quality as `judge.summary` gives them, returning subjects split by where they were
      first seen, and times; plus the first video to look at.
    """
    specs = footage.specs(batch)
    frames = frame_count(footage.chunks)
    verdicts: list[VideoVerdict] = []
    examples: list[Example] = []
    making: list[float] = []
    judging = 0.0

    def done(more: float) -> None:
        if tick is not None:
            tick(len(verdicts) / 2 + more / 2, len(specs))

    for at, group in _batches(specs, batch):
        begin, pieces = time.perf_counter(), []
        for piece in film(group, [footage.seed * 100_003 + at + i for i in range(batch)]):
            pieces.append(to_uint8(piece))
            done(at + batch * sum(p.shape[1] for p in pieces) / frames)
        videos = np.concatenate(pieces, axis=1)
        made = time.perf_counter()
        for spec, video in zip(group, videos, strict=True):
            verdicts.append(judge_video(to_pixels(video), spec.captions, frame_bounds(spec)))
            done(at + batch)
        if not examples:
            examples.append(_example(videos[0], group[0]))
        making.append(made - begin)
        judging += time.perf_counter() - made
    result = {**summary(verdicts), "returns": _returns(verdicts), "mistakes": _mistakes(verdicts)}
    result["shots"] = sum(len(spec.shots) for spec in specs)
    result["times"] = _times(making, judging, batch * frames)
    return result, examples[0]


def _batches(specs: list[VideoSpec], batch: int) -> Iterator[tuple[int, list[VideoSpec]]]:
    for at in range(0, len(specs), batch):
        yield at, specs[at : at + batch]


def _example(frames: np.ndarray, spec: VideoSpec) -> Example:
    return Example(tuple(frames[start:stop] for start, stop in frame_bounds(spec)), spec.captions)


def _returns(verdicts: Sequence[VideoVerdict]) -> dict[str, dict]:
    """How often a returning subject keeps mark and size, by where it was first seen.

    The first chunk of the video is the global sink, so only a subject of the first shot can be
    remembered for ever.
    """
    backs = [back for verdict in verdicts for back in verdict.returns]
    split = {
        "of_first_shot": [back for back in backs if back.first == 0],
        "of_later_shots": [back for back in backs if back.first > 0],
    }
    return {
        name: {
            "mark": rate(sum(back.same_mark for back in group), len(group)),
            "size": rate(sum(back.same_size for back in group), len(group)),
        }
        for name, group in split.items()
    }


def _mistakes(verdicts: Sequence[VideoVerdict], most: int = 10) -> dict[str, int]:
    """What is wrong most often: attribute, what the caption says, and what is seen instead."""
    found: Counter[str] = Counter()
    for shot in (shot for verdict in verdicts for shot in verdict.shots):
        scene = parse_caption(shot.caption)
        for kind, right in shot.right.items():
            if not right:
                meant, seen = getattr(scene, kind), shot.shown[kind] or "nothing clear"
                found[f"{kind}: {seen} for {meant}"] += 1
    return dict(found.most_common(most))


def rate(right: int, n: int) -> dict:
    """A share with its 95 % Wilson interval, in the form of `judge.summary`."""
    low, high = wilson(right, n)
    return {"rate": right / n if n else None, "n": n, "low": low, "high": high}


def _times(making: list[float], judging: float, frames: int) -> dict:
    """Seconds, and frames per second of the batches after the first one, which compiles."""
    later = making[1:]
    return {
        "first_batch": round(making[0], 2),
        "all_batches": round(sum(making), 2),
        "judging": round(judging, 2),
        "frames_per_second": round(len(later) * frames / sum(later), 1) if later else None,
        "video_seconds": round(len(making) * frames / FPS, 1),
    }
