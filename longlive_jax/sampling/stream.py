"""Streaming: an iterator of decoded chunks that can be steered between two of them.

At most `ahead` chunks are in flight beyond the one handed out, which bounds memory for a video of
any length. One thread may iterate while another steers.
"""

import atexit
import dataclasses
import itertools
import threading
import warnings
import weakref
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from longlive_jax.models.wan import TextKV
from longlive_jax.sampling.continuation import PastVideo
from longlive_jax.sampling.dispatch import (
    Chunk,
    Output,
    PendingChunk,
    StreamState,
    advance,
    chunk_inputs,
    run_ahead,
)
from longlive_jax.sampling.drivers import VideoConditioning
from longlive_jax.sampling.engine import Engine
from longlive_jax.sampling.timeline import Timeline
from longlive_jax.spec import UserError

PACKAGE = (str(Path(__file__).parents[1]),)
"""Folders whose lines no warning points at."""

__all__ = ["Chunk", "PendingChunk", "Stream", "StreamState", "advance", "run_ahead"]


class Stream(Iterator[Chunk]):
    """Yields one chunk after the other, for all videos of a batch.

        for chunk in stream:
            show(chunk.frames)               # uint8 [b, f, h, w, 3]
            if bored:
                stream.steer("a red square rises", cut=True)

    The first chunk has 1 + 4 (n - 1) frames and every other one 4 n, for n latents per chunk; all
    chunks that continue a video have 4 n. Videos shorter than the longest repeat their last prompt;
    `timeline.lengths` has their lengths. Memory does not grow with the length.

    Attributes:
      timeline: the scripts in chunks.
      notes: remarks for the user: rounded durations, truncated prompts, unknown words, frames of a
        continued video that are left out, a packed cache.
    """

    def __init__(
        self,
        engine: Engine,
        timeline: Timeline,
        conditioning: VideoConditioning,
        *,
        negative_prompts: Sequence[str] = (),
        past: PastVideo | None = None,
        endless: bool = False,
        output: Output = "uint8",
        notes: Sequence[str] = (),
    ):
        """A stream of `timeline` from its beginning; nothing is computed before the first chunk.

        Args:
          engine: the model.
          timeline: the scripts in chunks.
          conditioning: what stays constant for the batch.
          negative_prompts: one per video with guidance, none without.
          past: a video to be continued.
          endless: whether the last prompt repeats for ever.
          output: what the chunks hold.
          notes: remarks for the user.
        """
        self.timeline, self.notes = timeline, tuple(notes)
        self._engine, self._conditioning = engine, conditioning
        self._negative_prompts = tuple(negative_prompts)
        self._past, self._endless, self._output = past, endless, output
        self._text: tuple[tuple[str, ...], TextKV] | None = None
        self._lock = threading.Lock()  # `steer` may be called from another thread
        self._step_lock = threading.RLock()  # one thread at a time computes a chunk
        self._is_halted = False
        self._state: StreamState | None = StreamState(
            *engine.start(conditioning),
            timeline.videos(),
            past_chunks=0 if past is None else len(past.pieces),
        )
        self._chunks = self._run()
        _STREAMS.add(self)

    @property
    def state(self) -> StreamState:
        """The state after the chunk dispatched last, `ahead` chunks after the one handed out last.

        Raises ValueError after `close`.
        """
        if self._state is None:
            raise ValueError("the stream is closed")
        return self._state

    def __next__(self) -> Chunk:
        with self._step_lock:
            if self._is_halted:
                raise SystemExit  # ends a daemon thread whose process is exiting
            return next(self._chunks)

    def __repr__(self) -> str:
        if self._state is None:
            return "Stream(closed)"
        videos, total = len(self._state.videos), self.timeline.num_chunks
        length = "endless" if self._endless else f"{total} chunks"
        plural = "s" * (videos > 1)
        return f"Stream({videos} video{plural}, {length}, {self._state.num_chunks} dispatched)"

    def close(self) -> None:
        """Ends the stream and frees its cache."""
        with self._step_lock:
            self._chunks.close()
            self._state = None

    def steer(
        self, prompt: str | None = None, *, cut: bool = False, video: int | None = None
    ) -> None:
        """Replaces the rest of the script by `prompt`, from the next chunk not yet dispatched.

        That chunk is `ahead` chunks after the next one to be handed out. With `cut` it begins a new
        shot (and gets the prefix); without, the shot continues. No prompt keeps the current one.
        `video` selects one video of the batch, default all. Raises UserError for an empty prompt
        and a video that the batch lacks.
        """
        # 1. Arguments.
        count = len(self.state.videos)
        if prompt is not None and not isinstance(prompt, str):
            raise TypeError(f"prompt must be a string, got {prompt!r:.80}")
        if prompt is not None and not prompt.strip():
            raise UserError("the prompt is empty; leave it out to keep the current one")
        if not isinstance(cut, bool):
            raise TypeError(f"cut must be True or False, got {cut!r:.80}")
        if video is not None and (type(video) is not int or not 0 <= video < count):
            raise UserError(f"video must be an index in [0, {count - 1}], got {video!r:.80}")
        if prompt is not None:
            for note in self._engine.prompt_notes([prompt]):
                warnings.warn(note, skip_file_prefixes=PACKAGE)
        # 2. The videos from their next chunk on.
        with self._lock:
            videos = list(self.state.videos)
            for i in range(count) if video is None else [video]:
                videos[i] = videos[i].steer(prompt, cut=cut)
            self._state = dataclasses.replace(self.state, videos=tuple(videos))

    def halt(self) -> None:
        """Waits for the chunk that a thread is computing, and starts no other one."""
        self._is_halted = True
        with self._step_lock:
            pass

    def _run(self) -> Generator[Chunk, None, None]:
        if self._past is not None:
            self._write_past(self._past)
            self._past = None
        chunks = itertools.count() if self._endless else range(self.timeline.num_chunks)
        yield from run_ahead((self._advance() for _ in chunks), ahead=self._engine.spec.ahead)

    def _advance(self) -> PendingChunk:
        """Dispatches the next chunk and moves the state on."""
        # 1. The next prompt of every video.
        with self._lock:
            is_first = self.state.num_chunks + self.state.past_chunks == 0
            steps = [video.advance(is_first=is_first) for video in self.state.videos]
            videos = tuple(after for _, after in steps)
            state = self._state = dataclasses.replace(self.state, videos=videos)
        prompts = [prompt for prompt, _ in steps]
        # 2. Denoise and decode. Changes that `steer` makes meanwhile are preserved.
        text_kv = self._text_kv(tuple(video.prompt for video in prompts))
        chunk, state = advance(
            self._engine, self._conditioning, state, prompts, text_kv, output=self._output
        )
        with self._lock:
            self._state = dataclasses.replace(state, videos=self.state.videos)
        return chunk

    def _write_past(self, past: PastVideo) -> None:
        """Writes the video to be continued to the cache, under its prompts."""
        engine, state = self._engine, self.state
        cache, decoder = state.cache, state.decoder
        first_prompts = [row[0] for row in self.timeline.prompts]
        prompts_of_chunks = past.chunk_prompts(first_prompts, self.timeline.prefix)
        for latents, prompts in zip(past.latents(engine), prompts_of_chunks, strict=True):
            inputs = chunk_inputs(
                engine, prompts, self._text_kv(tuple(video.prompt for video in prompts))
            )
            cache = engine.write_context(cache, self._conditioning, inputs, latents)
            if self._output != "latents":
                _, _, decoder = engine.decode(decoder, latents, as_float=self._output == "float")
        with self._lock:
            self._state = dataclasses.replace(self.state, cache=cache, decoder=decoder)

    def _text_kv(self, prompts: tuple[str, ...]) -> TextKV:
        """Keys and values of the prompts and the negative ones; reused while they do not change."""
        if self._text is not None and self._text[0] == prompts:
            return self._text[1]
        text_kv = self._engine.text_kv((*prompts, *self._negative_prompts))
        self._text = prompts, text_kv
        return text_kv


_STREAMS: weakref.WeakSet[Stream] = weakref.WeakSet()


@atexit.register
def _halt_streams() -> None:
    """Lets daemon threads leave the runtime before the interpreter is torn down."""
    for stream in list(_STREAMS):
        stream.halt()
