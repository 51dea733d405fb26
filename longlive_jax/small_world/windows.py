"""Training windows of the small world's DiT, cut from encoded videos.

Every video is encoded once and from its start, so the latents of a window depend on the VAE's
causal past exactly as in sampling. A window consists of what the sampler attends to (the global
sink, the shot sink and the recent chunks), followed by the chunks to denoise.
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
    """Latents of n videos with k chunks each, and their prompts.

    Attributes:
      latents: latent frames, float16.
      prompt: row of `prompt_table()` per chunk.
      shot: index of the shot per chunk.
    """

    latents: Float[np.ndarray, "n f h w c"]
    prompt: Int[np.ndarray, "n k"]
    shot: Int[np.ndarray, "n k"]


def prompt_table() -> tuple[str, ...]:
    """All prompts of chunks: captions, captions with the cut prefix, and last the empty prompt."""
    plain = words.all_captions()
    return (*plain, *(CUT_PREFIX + text for text in plain), "")


def chunk_prompts(spec: VideoSpec) -> tuple[np.ndarray, np.ndarray]:
    """Prompt row and shot index of every chunk, int32 [k] each.

    The first chunk after a cut has the cut prefix in its prompt.
    """
    plain = words.all_captions()
    prompt, shot = [], []
    for i, shot_spec in enumerate(spec.shots):
        row = plain.index(shot_spec.caption)
        first = row + len(plain) * (i > 0)
        prompt += [first] + [row] * (shot_spec.chunks - 1)
        shot += [i] * shot_spec.chunks
    return np.array(prompt, np.int32), np.array(shot, np.int32)


def encode_videos(
    vae: VAE,
    *,
    videos: int,
    chunks: int,
    shot_chunks: tuple[int, int],
    seed: int,
    batch: int = 8,
    skip: int = 0,
) -> Iterator[EncodedVideos]:
    """Samples, renders and encodes `videos` training videos, and yields them `batch` at a time.

    The first `skip` batches are left out; the others are the same without it.
    """
    encode_batch = jax.jit(lambda frames: encode(vae, frames, chunk_frames=CHUNK_LATENTS + 1))
    rng = np.random.default_rng(seed)

    def sample_batch() -> list[VideoSpec]:
        return [sample_spec(rng, chunks=chunks, shot_chunks=shot_chunks) for _ in range(batch)]

    def render_batch() -> tuple[list[VideoSpec], np.ndarray]:
        specs = sample_batch()
        return specs, np.stack([render(spec) for spec in specs])

    for _ in range(skip):
        sample_batch()
    if skip * batch >= videos:
        return
    with concurrent.futures.ThreadPoolExecutor(1) as renderer:  # renders while the VAE encodes
        pending = renderer.submit(render_batch)
        for done in range(batch * (skip + 1), videos + batch, batch):
            specs, frames = pending.result()
            if done < videos:
                pending = renderer.submit(render_batch)
            z = encode_batch(jnp.asarray(frames))
            prompt, shot = (np.stack(x) for x in zip(*map(chunk_prompts, specs), strict=True))
            yield EncodedVideos(np.asarray(z, np.float16), prompt, shot)


@dataclasses.dataclass(frozen=True)
class WindowSpec:
    """Shape of a training window, which imitates the sampler's attention window.

    Attributes:
      batch: windows per batch.
      targets: consecutive chunks to denoise, in addition to the video's first chunk.
      window: chunks that a chunk attends to, including itself and the sinks.
      global_sinks: chunks in the global sink, 0 or 1.
      shot_rope_offset: latent frames added to temporal positions at every cut.
      far: maximum random gap, in latent frames, between the global sink and the rest of the
        video. The recent chunks are also moved away from their shot sink, by up to far / 4.
        In this way videos of seconds train distances of minutes.
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
                f"windows.global_sinks must be 0 or 1, got {self.global_sinks}: the global sink is "
                "the video's first chunk"
            )

    @property
    def context_chunks(self) -> int:
        """Number of context chunks: both sinks, and the chunks before the last target."""
        return 2 + (self.window - 1) + (self.targets - 1)

    @property
    def target_chunks(self) -> int:
        """Number of target chunks, including the video's first."""
        return 1 + self.targets


@dataclasses.dataclass(frozen=True)
class WindowBatches(Sequence):
    """Training batches as a function of their index, with the fields of `TeacherForcingBatch`.

    Attributes:
      videos: videos to cut windows from.
      spec: shape of the windows.
      steps: number of batches.
      seed: random seed.
    """

    videos: EncodedVideos
    spec: WindowSpec
    steps: int
    seed: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, int(i)))
        rows = [self._window(rng) for _ in range(self.spec.batch)]
        return {k: np.stack([row[k] for row in rows]) for k in rows[0]}

    def _window(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A random window of a random video."""
        # 1. Choose the video and the target chunks.
        spec, m = self.spec, CHUNK_LATENTS
        video = int(rng.integers(len(self.videos.latents)))
        shot, prompt = self.videos.shot[video], self.videos.prompt[video]
        first = int(rng.integers(1, len(shot) - spec.targets + 1))
        target = np.array([0, *range(first, first + spec.targets)])
        # 2. Collect the chunks that the sampler would attend to.
        window_start, sink = (column[video] for column in self._attention_windows)
        recent = range(first - spec.window + 1, first + spec.targets - 1)
        context = _distinct([0, int(sink[first]), *recent])
        order = np.concatenate([context, target])
        # 3. Gather their latents; EMPTY chunks carry those of chunk 0 and are never attended to.
        chunks = np.maximum(order, 0)
        frames = (chunks[:, None] * m + np.arange(m)).reshape(-1)
        latents = self.videos.latents[video][frames].astype(np.float32)
        cut = m * len(context)
        return {
            "context": latents[:cut],
            "target": latents[cut:],
            "mask": np.ones(m * len(target), np.float32),
            "chunk_index": order.astype(np.int32),
            "start": self._positions(rng, chunks, shot, first),
            "window_start": window_start[chunks],
            "sink": sink[chunks],
            "prompt": prompt[chunks],
        }

    @functools.cached_property
    def _attention_windows(self) -> tuple[np.ndarray, np.ndarray]:
        """`window_start` and `sink` [n, k] of every chunk of every video."""
        cuts = np.diff(self.videos.shot, prepend=0) > 0
        spec = self.spec
        columns = windows(jnp.asarray(cuts), window=spec.window, global_sinks=spec.global_sinks)
        window_start, sink = map(np.asarray, columns)
        return window_start, sink

    def _positions(self, rng, order: np.ndarray, shot: np.ndarray, first: int) -> np.ndarray:
        """Temporal start positions of the chunks, with random gaps after the sinks."""
        spec = self.spec
        start = order * CHUNK_LATENTS + spec.shot_rope_offset * shot[order]
        start += (order > 0) * rng.integers(spec.far + 1) * (rng.random() < 0.5)
        late = order >= first - spec.window + 1
        start += late * rng.integers(spec.far // 4 + 1) * (rng.random() < 0.3)
        return start.astype(np.int32)


def _distinct(chunks: list[int]) -> np.ndarray:
    """The chunks, with repeated and negative indices replaced by EMPTY."""
    distinct: list[int] = []
    for chunk in chunks:
        distinct.append(EMPTY if chunk < 0 or chunk in distinct else chunk)
    return np.array(distinct)
