"""Training data of the small world's DiT: videos as latents, and windows of them as episodes.

Videos are encoded once, whole, so a window's latents carry the VAE's causal past exactly as they do
when a video is sampled. An episode is cut from a video the way the sampler would see it: the global
sink, the shot sink, the recent chunks, then the chunks to denoise.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.layout import windows
from longlive_jax.models.vae import VAE, encode
from longlive_jax.small_world import words
from longlive_jax.small_world.world import CHUNK_LATENTS, VideoSpec, render, sample_spec
from longlive_jax.typing import Float, Int
from pallas_kernels.tokens import EMPTY


@dataclasses.dataclass(frozen=True)
class EncodedVideos:
    """Latents of many videos of equal length, and which prompt every chunk has."""

    latents: Float[np.ndarray, "n f h w c"]  # float16 at rest
    prompt: Int[np.ndarray, "n k"]  # row of `prompt_table()`
    shot: Int[np.ndarray, "n k"]


def prompt_table() -> tuple[str, ...]:
    """Every prompt a chunk can have: captions, captions after a cut, and the empty one (last)."""
    plain = words.all_captions()
    return (*plain, *(CUT_PREFIX + text for text in plain), "")


def chunk_prompts(spec: VideoSpec) -> tuple[np.ndarray, np.ndarray]:
    """Prompt row and shot index of every chunk; the first chunk after a cut has the prefix."""
    plain = words.all_captions()
    prompt, shot = [], []
    for i, one in enumerate(spec.shots):
        row = plain.index(one.caption)
        first = row + len(plain) * (i > 0)
        prompt += [first] + [row] * (one.chunks - 1)
        shot += [i] * one.chunks
    return np.array(prompt, np.int32), np.array(shot, np.int32)


def encode_videos(
    vae: VAE, *, videos: int, chunks: int, shot_chunks: tuple[int, int], seed: int, batch: int = 8
) -> Iterator[EncodedVideos]:
    """Draws, renders and encodes `videos` training videos, `batch` at a time."""
    encode_batch = jax.jit(lambda frames: encode(vae, frames, chunk_frames=CHUNK_LATENTS + 1))
    rng = np.random.default_rng(seed)

    def drawn() -> tuple[list[VideoSpec], np.ndarray]:
        specs = [sample_spec(rng, chunks=chunks, shot_chunks=shot_chunks) for _ in range(batch)]
        return specs, np.stack([render(spec) for spec in specs])

    with concurrent.futures.ThreadPoolExecutor(1) as painter:  # draws while the VAE works
        following = painter.submit(drawn)
        for done in range(batch, videos + batch, batch):
            specs, frames = following.result()
            if done < videos:
                following = painter.submit(drawn)
            z = encode_batch(jnp.asarray(frames))
            prompt, shot = (np.stack(x) for x in zip(*map(chunk_prompts, specs), strict=True))
            yield EncodedVideos(np.asarray(z, np.float16), prompt, shot)


@dataclasses.dataclass(frozen=True)
class WindowSpec:
    """Shape of an episode and the sampler's window that it imitates, in chunks.

    Attributes:
      targets: consecutive chunks to denoise, beside the video's first one.
      window: chunks that a chunk may see, itself and sinks included.
      phase: frames added to temporal positions at every cut.
      far: most frames by which the rest of a video is moved away from its global sink; the recent
        chunks are moved from their shot sink by up to a quarter of it. So videos of seconds teach
        distances of minutes.
    """

    batch: int = 16
    targets: int = 7
    window: int = 4
    global_sinks: int = 1
    shot_rope_offset: int = 8
    far: int = 320

    def __post_init__(self) -> None:
        if self.global_sinks not in (0, 1):
            raise ValueError(
                f"episodes.global_sinks is {self.global_sinks}; an episode carries the video's "
                "first chunk or none, so give 0 or 1"
            )

    @property
    def context_chunks(self) -> int:
        """Of an episode: both sinks, and what the targets can see before them."""
        return 2 + (self.window - 1) + (self.targets - 1)

    @property
    def target_chunks(self) -> int:
        """Of an episode, the video's first included."""
        return 1 + self.targets


@dataclasses.dataclass(frozen=True)
class WindowBatches(Sequence):
    """Batch i of the run as a function of i; entries as in `TeacherForcingBatch`."""

    videos: EncodedVideos
    spec: WindowSpec
    steps: int
    seed: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, int(i)))
        rows = [self._episode(rng) for _ in range(self.spec.batch)]
        return {k: np.stack([row[k] for row in rows]) for k in rows[0]}

    def _episode(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        spec, m = self.spec, CHUNK_LATENTS
        video = int(rng.integers(len(self.videos.latents)))
        shot, prompt = self.videos.shot[video], self.videos.prompt[video]
        first = int(rng.integers(1, len(shot) - spec.targets + 1))
        target = np.array([0, *range(first, first + spec.targets)])
        window_start, sink = (column[video] for column in self._windows)
        recent = range(first - spec.window + 1, first + spec.targets - 1)
        context = _distinct([0, int(sink[first]), *recent])
        order = np.concatenate([context, target])
        there = np.maximum(order, 0)
        frames = (there[:, None] * m + np.arange(m)).reshape(-1)
        latents = self.videos.latents[video][frames].astype(np.float32)
        cut = m * len(context)
        return {
            "context": latents[:cut],
            "target": latents[cut:],
            "mask": np.ones(m * len(target), np.float32),
            "chunk_index": order.astype(np.int32),
            "start": self._positions(rng, there, shot, first),
            "window_start": window_start[there],
            "sink": sink[there],
            "prompt": prompt[there],
        }

    @functools.cached_property
    def _windows(self) -> tuple[np.ndarray, np.ndarray]:
        """`window_start` and `sink` of every chunk of every video."""
        cuts = np.diff(self.videos.shot, prepend=0) > 0
        spec = self.spec
        columns = windows(jnp.asarray(cuts), window=spec.window, global_sinks=spec.global_sinks)
        window_start, sink = map(np.asarray, columns)
        return window_start, sink

    def _positions(self, rng, order: np.ndarray, shot: np.ndarray, first: int) -> np.ndarray:
        spec = self.spec
        start = order * CHUNK_LATENTS + spec.shot_rope_offset * shot[order]
        start += (order > 0) * rng.integers(spec.far + 1) * (rng.random() < 0.5)
        late = order >= first - spec.window + 1
        start += late * rng.integers(spec.far // 4 + 1) * (rng.random() < 0.3)
        return start.astype(np.int32)


def _distinct(chunks: list[int]) -> np.ndarray:
    """The same chunks with repeats and those before the video replaced by EMPTY."""
    found: list[int] = []
    for chunk in chunks:
        found.append(EMPTY if chunk < 0 or chunk in found else chunk)
    return np.array(found)
