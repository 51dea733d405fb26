"""Dispatches chunks without waiting for them, and fetches their frames.

JAX queues work, so the decode of chunk i and the denoising of chunk i + 1 overlap without threads:
the host waits only for the frames that it hands out.

A process must not end while frames are being copied to the host: the copy would finish in a thread
of its own, without an interpreter, and abort the process. Every `PendingChunk` is therefore waited
for when it is discarded, and at the latest when the interpreter exits.
"""

import dataclasses
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from longlive_jax.models.wan import TextKV
from longlive_jax.models.wan.cache import KVCache
from longlive_jax.sampling.drivers import ChunkInputs, VideoConditioning
from longlive_jax.sampling.engine import Engine
from longlive_jax.sampling.streaming_vae import DecoderState
from longlive_jax.sampling.timeline import ChunkPrompt, VideoTimeline
from longlive_jax.spec import Failure
from longlive_jax.typing import Array, Bool, Float, Shaped

Output = Literal["uint8", "float", "latents"]
"""What is computed for a chunk: frames as bytes, frames as float32 in [-1, 1], or latents alone."""


class SamplerDiverged(Failure, FloatingPointError):
    """Latents or frames are not finite."""


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """One chunk of every video of a batch.

    Attributes:
      frames: decoded frames on the host: uint8, or float32 in [-1, 1] with `output="float"`. None
        are decoded with `output="latents"`: f is 0.
      latents: the same chunk as latents, float32 on the DiT's device.
      index: index of the chunk in the stream.
      prompt: prompt of each video, with the cut prefix where a shot begins.
      cut: whether a new shot begins with the chunk, for each video.
      first_frame: index of the chunk's first raw frame in the stream.
    """

    frames: Shaped[np.ndarray, "b f h w 3"]
    latents: Float[Array, "b n h2 w2 c"]
    index: int
    prompt: tuple[str, ...]
    cut: Bool[np.ndarray, "b"]
    first_frame: int


@struct.dataclass
class StreamState:
    """Everything that a stream carries from one chunk to the next: a pytree.

    The next chunk donates its arrays; `jax.tree.map(jnp.copy, state)` is a snapshot that stays
    valid.

    Attributes:
      cache: keys and values of the window, on the DiT's device.
      decoder: state of the VAE's decoder, on the VAE's device.
      videos: position of each video in its script.
      num_chunks: chunks dispatched so far.
      num_frames: raw frames dispatched so far.
      past_chunks: chunks of the video that is continued; 0 for a new video.
    """

    cache: KVCache
    decoder: DecoderState
    videos: tuple[VideoTimeline, ...] = struct.field(pytree_node=False)
    num_chunks: int = struct.field(pytree_node=False, default=0)
    num_frames: int = struct.field(pytree_node=False, default=0)
    past_chunks: int = struct.field(pytree_node=False, default=0)


@dataclasses.dataclass(frozen=True, eq=False)
class PendingChunk:
    """A dispatched chunk, whose arrays may still be computing.

    Attributes:
      frames: decoded frames on the VAE's device, as in `Chunk`.
      is_finite: whether latents and frames are finite.
      latents, index, prompt, cut, first_frame: as in `Chunk`.
    """

    frames: Shaped[Array | np.ndarray, "b f h w 3"]
    is_finite: Bool[Array, ""]
    latents: Float[Array, "b n h2 w2 c"]
    index: int
    prompt: tuple[str, ...]
    cut: Bool[np.ndarray, "b"]
    first_frame: int

    def __post_init__(self) -> None:
        weakref.finalize(self, _wait, self.frames, self.is_finite, self.latents)

    def fetch(self) -> Chunk:
        """Waits for the frames; SamplerDiverged if latents or frames are not finite."""
        frames = np.asarray(self.frames)
        if not bool(self.is_finite):
            raise SamplerDiverged(
                f"the sampler has diverged in chunk {self.index + 1}: latents or frames are not "
                "finite; set dtype to float32 or lower the guidance"
            )
        return Chunk(frames, self.latents, self.index, self.prompt, self.cut, self.first_frame)


def _wait(frames: Array | np.ndarray, is_finite: Array, latents: Array) -> None:
    """Waits until a chunk is computed and its frames are on the host."""
    try:
        jax.block_until_ready((is_finite, latents))
        np.asarray(frames)
    except jax.errors.JaxRuntimeError:
        return  # the computation has failed, so nothing is in flight; `fetch` raises the error


def advance(
    engine: Engine,
    conditioning: VideoConditioning,
    state: StreamState,
    prompts: Sequence[ChunkPrompt],
    text_kv: TextKV,
    *,
    output: Output = "uint8",
) -> tuple[PendingChunk, StreamState]:
    """Dispatches the denoising and decoding of the next chunk; `state` is donated.

    `prompts` has one entry per video; `text_kv` are their keys and values, with those of the
    negative prompts after them if there is guidance. Returns the chunk and the state after it.
    """
    # 1. Denoise and decode.
    latents, cache = engine.step(state.cache, conditioning, chunk_inputs(engine, prompts, text_kv))
    decoder, num_frames = state.decoder, _num_frames(engine, state, latents.shape[1])
    frames: Array | np.ndarray
    if output == "latents":
        frames, is_finite = _no_frames(engine, latents), jnp.isfinite(latents).all()
    else:
        decoded, is_finite, decoder = engine.decode(decoder, latents, as_float=output == "float")
        decoded.copy_to_host_async()
        frames = decoded
    # 2. The chunk and the state after it.
    chunk = PendingChunk(
        frames,
        is_finite,
        latents,
        index=state.num_chunks,
        prompt=tuple(video.prompt for video in prompts),
        cut=np.array([video.cut for video in prompts]),
        first_frame=state.num_frames,
    )
    state = dataclasses.replace(
        state,
        cache=cache,
        decoder=decoder,
        num_chunks=state.num_chunks + 1,
        num_frames=state.num_frames + num_frames,
    )
    return chunk, state


def _num_frames(engine: Engine, state: StreamState, latents: int) -> int:
    """Raw frames of the next chunk, decoded or not."""
    is_first = state.num_chunks + state.past_chunks == 0
    return engine.vae.cfg.temporal_stride * latents - is_first * (
        engine.vae.cfg.temporal_stride - 1
    )


def _no_frames(engine: Engine, latents: Array) -> np.ndarray:
    batch, _, *edges, _ = latents.shape
    height, width = (edge * engine.vae.cfg.spatial_stride for edge in edges)
    return np.zeros((batch, 0, height, width, 3), np.uint8)


def chunk_inputs(engine: Engine, prompts: Sequence[ChunkPrompt], text_kv: TextKV) -> ChunkInputs:
    """The inputs of a chunk with these prompts, one per video, and their keys and values."""
    shots = np.array([video.shot for video in prompts], np.int32)
    return ChunkInputs(
        text=text_kv,
        cut=np.array([video.cut for video in prompts]),
        shot_rope_offset=shots * np.int32(engine.spec.shot_rope_offset),
    )


def run_ahead(chunks: Iterable[PendingChunk], *, ahead: int = 1) -> Iterator[Chunk]:
    """Yields each chunk with its frames on the host while `ahead` more chunks are in flight.

    Raises SamplerDiverged for latents or frames that are not finite.
    """
    in_flight: deque[PendingChunk] = deque()
    for chunk in chunks:
        in_flight.append(chunk)
        if len(in_flight) > ahead:
            yield in_flight.popleft().fetch()
    while in_flight:
        yield in_flight.popleft().fetch()
