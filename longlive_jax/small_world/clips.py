"""Training clips of the small world's bidirectional base model, cut from encoded videos.

All chunks of a clip have chunk index 0 and are noisy. By `pallas_kernels.tokens.visible` they all
attend to each other then, and a clip has no context. Every chunk keeps its own prompt.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from longlive_jax.small_world.windows import EncodedVideos
from longlive_jax.small_world.world import CHUNK_LATENTS
from longlive_jax.spec import UserError, check_minimums
from pallas_kernels.tokens import EMPTY


@dataclasses.dataclass(frozen=True)
class ClipSpec:
    """Shape of a training clip.

    Attributes:
      batch: clips per batch.
      chunks: consecutive chunks of a clip.
      inside: share of the clips that begin at any chunk of a video; the others begin with the
        video, as a generated one does.
      shot_rope_offset: latent frames added to temporal positions at every cut.
    """

    batch: int = 16
    chunks: int = 7
    inside: float = 0.0
    shot_rope_offset: int = 8

    def __post_init__(self) -> None:
        check_minimums(self, batch=1, chunks=2)
        if not 0 <= self.inside <= 1:
            raise ValueError(f"inside must be between 0 and 1, got {self.inside}")

    @property
    def context_chunks(self) -> int:
        """Number of context chunks."""
        return 0

    @property
    def target_chunks(self) -> int:
        """Number of chunks to denoise."""
        return self.chunks

    @property
    def window(self) -> int:
        """Number of chunks that a chunk attends to."""
        return self.chunks

    @property
    def global_sinks(self) -> int:
        """Number of chunks that a sampler protects; a window of the whole clip needs none."""
        return 0


@dataclasses.dataclass(frozen=True)
class ClipBatches(Sequence):
    """Training batches as a function of their index, with the fields of `TeacherForcingBatch`.

    Attributes:
      videos: videos to cut clips from.
      spec: shape of the clips.
      steps: number of batches.
      seed: random seed.

    Raises UserError if a clip is longer than the videos.
    """

    videos: EncodedVideos
    spec: ClipSpec
    steps: int
    seed: int

    def __post_init__(self) -> None:
        chunks = self.videos.shot.shape[1]
        if self.spec.chunks > chunks:
            raise UserError(
                f"config.windows.chunks must be <= corpus.chunks = {chunks}, got {self.spec.chunks}"
            )

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, int(i)))
        rows = [self._clip(rng) for _ in range(self.spec.batch)]
        return {k: np.stack([row[k] for row in rows]) for k in rows[0]}

    def _clip(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A random clip of a random video."""
        # 1. Choose the video and the chunks.
        n, m = self.spec.chunks, CHUNK_LATENTS
        video = int(rng.integers(len(self.videos.latents)))
        first = int(rng.integers(self.videos.shot.shape[1] - n + 1))
        first *= int(rng.random() < self.spec.inside)
        shot = self.videos.shot[video, first : first + n]
        # 2. Gather their latents; all chunks have one index, so all attend to each other.
        latents = self.videos.latents[video, first * m : (first + n) * m].astype(np.float32)
        start = np.arange(n) * m + self.spec.shot_rope_offset * (shot - shot[0])
        return {
            "context": latents[:0],
            "target": latents,
            "mask": np.ones(n * m, np.float32),
            "chunk_index": np.zeros(n, np.int32),
            "start": start.astype(np.int32),
            "window_start": np.zeros(n, np.int32),
            "sink": np.full(n, EMPTY, np.int32),
            "prompt": self.videos.prompt[video, first : first + n],
        }
