"""Streaming: an iterator of decoded chunks that can be steered between two of them.

JAX dispatches work without waiting for it, so overlap needs no threads: the decode of chunk i and
the denoising of chunk i + 1 are queued, and the host waits only for the frames it hands out. At
most `ahead` further chunks are in flight, which bounds memory for a video of any length.
"""

import dataclasses
import itertools
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence

import jax
import numpy as np
from flax import struct

from longlive_jax.models.wan import TextKV
from longlive_jax.models.wan.cache import KVCache
from longlive_jax.sampling.drivers import ChunkInputs, VideoConditioning
from longlive_jax.sampling.engine import Engine
from longlive_jax.sampling.streaming_vae import DecoderState
from longlive_jax.sampling.timeline import ChunkPrompt, Timeline, VideoTimeline
from longlive_jax.typing import Array, Bool, Float, UInt8


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """One chunk of every video of a batch.

    Attributes:
      frames: decoded frames, uint8 on the host.
      latents: the same chunk as latents, float32 on the DiT's device.
      index: index of the chunk in the stream.
      prompt: prompt of each video, with the cut prefix where a shot begins.
      cut: whether a new shot begins with the chunk, for each video.
      first_frame: index of the chunk's first raw frame in the stream.
    """

    frames: UInt8[np.ndarray, "b f h w 3"]
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
    """

    cache: KVCache
    decoder: DecoderState
    videos: tuple[VideoTimeline, ...] = struct.field(pytree_node=False)
    num_chunks: int = struct.field(pytree_node=False, default=0)
    num_frames: int = struct.field(pytree_node=False, default=0)


@dataclasses.dataclass(frozen=True, eq=False)
class PendingChunk:
    """A dispatched chunk, whose arrays may still be computing.

    Attributes:
      frames: decoded frames, uint8 on the VAE's device.
      is_finite: whether all latents are finite.
      latents, index, prompt, cut, first_frame: as in `Chunk`.
    """

    frames: UInt8[Array, "b f h w 3"]
    is_finite: Bool[Array, ""]
    latents: Float[Array, "b n h2 w2 c"]
    index: int
    prompt: tuple[str, ...]
    cut: Bool[np.ndarray, "b"]
    first_frame: int

    def fetch(self) -> Chunk:
        """Waits for the frames; FloatingPointError if the latents are not finite."""
        frames = np.asarray(self.frames)
        if not bool(self.is_finite):
            raise FloatingPointError(
                "the sampler has diverged: latents are not finite; set dtype to float32 or lower "
                "the guidance"
            )
        return Chunk(frames, self.latents, self.index, self.prompt, self.cut, self.first_frame)


def advance(
    engine: Engine,
    conditioning: VideoConditioning,
    state: StreamState,
    prompts: Sequence[ChunkPrompt],
    text_kv: TextKV,
) -> tuple[PendingChunk, StreamState]:
    """Dispatches the denoising and decoding of the next chunk; `state` is donated.

    `prompts` has one entry per video; `text_kv` are their keys and values, with those of the
    negative prompts after them if there is guidance. Returns the chunk and the state after it.
    """
    latents, cache = engine.step(state.cache, conditioning, _chunk_inputs(engine, prompts, text_kv))
    frames, is_finite, decoder = engine.decode(state.decoder, latents)
    frames.copy_to_host_async()
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
        num_frames=state.num_frames + frames.shape[1],
    )
    return chunk, state


class Stream(Iterator[Chunk]):
    """Yields one chunk after the other, for all videos of a batch.

        for chunk in stream:
            show(chunk.frames)               # uint8 [b, f, h, w, 3]
            if bored:
                stream.steer("a red square rises", cut=True)

    The first chunk has 1 + 4 (n - 1) frames and every other one 4 n, for n latents per chunk.
    Videos shorter than the longest repeat their last prompt; `timeline.lengths` has their lengths.
    Memory does not grow with the length.

    Attributes:
      timeline: the scripts in chunks.
      notes: remarks for the user: rounded durations, truncated prompts, a packed cache.
    """

    def __init__(
        self,
        engine: Engine,
        timeline: Timeline,
        conditioning: VideoConditioning,
        *,
        negative_prompts: Sequence[str] = (),
        video: Float[np.ndarray, "b f h w 3"] | None = None,
        endless: bool = False,
        notes: Sequence[str] = (),
    ):
        """A stream of `timeline` from its beginning; nothing is computed before the first chunk.

        Args:
          engine: the model.
          timeline: the scripts in chunks.
          conditioning: what stays constant for the batch.
          negative_prompts: one per video with guidance, none without.
          video: a video to be continued.
          endless: whether the last prompt repeats for ever.
          notes: remarks for the user.
        """
        self.timeline, self.notes = timeline, tuple(notes)
        self._engine, self._conditioning = engine, conditioning
        self._negative_prompts = tuple(negative_prompts)
        self._video, self._endless = video, endless
        self._text: tuple[tuple[str, ...], TextKV] | None = None
        self._lock = threading.Lock()  # `steer` may be called from another thread
        self._state: StreamState | None = StreamState(
            *engine.start(conditioning), timeline.videos()
        )
        self._chunks = self._run()

    @property
    def state(self) -> StreamState:
        """The state after the chunk dispatched last, `ahead` chunks after the one handed out last.

        Raises ValueError after `close`.
        """
        if self._state is None:
            raise ValueError("the stream is closed")
        return self._state

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        """Ends the stream and frees its cache."""
        self._chunks.close()
        self._state = None

    def steer(
        self, prompt: str | None = None, *, cut: bool = False, video: int | None = None
    ) -> None:
        """Replaces the rest of the script by `prompt`, from the next chunk not yet dispatched.

        That chunk is `ahead` chunks after the next one to be handed out. With `cut` it begins a new
        shot (and gets the prefix); without, the shot continues. No prompt keeps the current one.
        `video` selects one video of the batch, default all. Raises ValueError for an empty prompt.
        """
        if prompt is not None and not prompt.strip():
            raise ValueError("the prompt is empty; leave it out to keep the current one")
        if prompt is not None:
            for note in self._engine.truncations([prompt]):
                warnings.warn(note, stacklevel=2)
        with self._lock:
            videos = list(self.state.videos)
            for i in range(len(videos)) if video is None else [video]:
                videos[i] = videos[i].steer(prompt, cut=cut)
            self._state = dataclasses.replace(self.state, videos=tuple(videos))

    def _run(self) -> Generator[Chunk, None, None]:
        if self._video is not None:
            self._write_video(self._video)
        chunks = itertools.count() if self._endless else range(self.timeline.num_chunks)
        yield from run_ahead((self._advance() for _ in chunks), ahead=self._engine.spec.ahead)

    def _advance(self) -> PendingChunk:
        """Dispatches the next chunk and moves the state on."""
        # 1. The next prompt of every video.
        with self._lock:
            is_first = self.state.num_chunks == 0 and self._video is None
            steps = [video.advance(is_first=is_first) for video in self.state.videos]
            videos = tuple(after for _, after in steps)
            state = self._state = dataclasses.replace(self.state, videos=videos)
        prompts = [prompt for prompt, _ in steps]
        # 2. Denoise and decode. Changes that `steer` makes meanwhile are preserved.
        text_kv = self._text_kv(tuple(video.prompt for video in prompts))
        chunk, state = advance(self._engine, self._conditioning, state, prompts, text_kv)
        with self._lock:
            self._state = dataclasses.replace(state, videos=self.state.videos)
        return chunk

    def _write_video(self, video: np.ndarray) -> None:
        """Writes the video to be continued to the cache, under the script's first prompt."""
        engine, state = self._engine, self.state
        prompts = [ChunkPrompt(row[0], False, 0) for row in self.timeline.prompts]
        text_kv = self._text_kv(tuple(video.prompt for video in prompts))
        inputs = _chunk_inputs(engine, prompts, text_kv)
        cache, decoder = state.cache, state.decoder
        for latents in engine.encode_video(video):
            cache = engine.write_context(cache, self._conditioning, inputs, latents)
            _, _, decoder = engine.decode(decoder, latents)
        with self._lock:
            self._state = dataclasses.replace(self.state, cache=cache, decoder=decoder)

    def _text_kv(self, prompts: tuple[str, ...]) -> TextKV:
        """Keys and values of the prompts and the negative ones; reused while they do not change."""
        if self._text is not None and self._text[0] == prompts:
            return self._text[1]
        text_kv = self._engine.text_kv((*prompts, *self._negative_prompts))
        self._text = prompts, text_kv
        return text_kv


def run_ahead(chunks: Iterable[PendingChunk], *, ahead: int = 1) -> Iterator[Chunk]:
    """Yields each chunk with its frames on the host while `ahead` more chunks are in flight.

    Raises FloatingPointError for latents that are not finite.
    """
    in_flight: deque[PendingChunk] = deque()
    try:
        for chunk in chunks:
            in_flight.append(chunk)
            if len(in_flight) > ahead:
                yield in_flight.popleft().fetch()
        while in_flight:
            yield in_flight.popleft().fetch()
    finally:
        # A consumer that stops early may end the process, which aborts if computations still run.
        jax.block_until_ready([(x.frames, x.is_finite, x.latents) for x in in_flight])


def _chunk_inputs(engine: Engine, prompts: Sequence[ChunkPrompt], text_kv: TextKV) -> ChunkInputs:
    shots = np.array([video.shot for video in prompts], np.int32)
    return ChunkInputs(
        text=text_kv,
        cut=np.array([video.cut for video in prompts]),
        shot_rope_offset=shots * np.int32(engine.spec.shot_rope_offset),
    )
