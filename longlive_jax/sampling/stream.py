"""A video in the making: an iterator of decoded chunks that can be steered between two of them."""

import dataclasses
import itertools
import warnings
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from longlive_jax.sampling.drivers import ChunkInputs
from longlive_jax.sampling.script import ShotScript
from longlive_jax.sampling.streaming_vae import overlapped
from longlive_jax.typing import Array, Float, UInt8

if TYPE_CHECKING:
    from longlive_jax.sampling.pipeline import Pipeline


@dataclasses.dataclass
class VideoTimeline:
    """One video of the batch: the shot it is in, and where it has left its script."""

    script: tuple[str, ...]
    cuts: np.ndarray
    prefix: str
    chunk: int = 0
    shot: int = 0
    prompt: str | None = None
    cut: bool = False

    def steer(self, prompt: str | None, *, cut: bool) -> None:
        """Replaces the rest of the script by `prompt`, or by the one of the chunk begun last."""
        if prompt is None and self.prompt is None:
            last = max(0, min(self.chunk, len(self.script)) - 1)
            prompt = self.script[last].removeprefix(self.prefix)
        self.prompt = self.prompt if prompt is None else prompt
        self.cut |= cut

    def next(self, *, first: bool) -> tuple[str, bool, int]:
        """Prompt, cut and shot of the next chunk; the very first chunk cannot be a cut."""
        cut = False
        if self.prompt is not None:
            cut, self.cut = self.cut and not first, False
            prompt = self.prefix + self.prompt.removeprefix(self.prefix) if cut else self.prompt
        elif self.chunk < len(self.script):
            prompt, cut = self.script[self.chunk], bool(self.cuts[self.chunk])
        else:
            prompt = self.script[-1].removeprefix(self.prefix)
        self.chunk += 1
        self.shot += cut
        return prompt, cut, self.shot


class Stream(Iterator[UInt8[np.ndarray, "b f h w 3"]]):
    """Yields the frames of one chunk after the other, for all videos of the batch.

    for frames in stream:              # uint8 [b, f, h, w, 3]
        show(frames)
        if bored: stream.steer("a red square rises", cut=True)

    The first chunk has 1 + 4 (n - 1) frames and every other one 4 n, for n latents a chunk. Videos
    shorter than the longest go on with their last prompt; `plan.lengths` says how long they are.
    Memory does not grow with the length.

    Attributes:
      plan: what the scripts ask for.
      notes: remarks for the user: rounded durations, prompts that were cut off, a packed cache.
      made: chunks handed out so far.
      latents: of the chunk handed out last, float32 [b, f, h, w, c], on the device.
    """

    def __init__(
        self,
        pipe: "Pipeline",
        scripts: Sequence[ShotScript],
        *,
        video: Float[np.ndarray, "b f h w 3"] | None = None,
        endless: bool = False,
    ):
        self._pipe, self._scripts = pipe, list(scripts)
        self.plan = pipe.plan(self._scripts)
        self.notes = (*self.plan.notes, *pipe.truncations(self.plan))
        self.made = 0
        self.latents: Float[Array, "b f h w c"] | None = None
        self._endless = endless
        self._lanes = [
            VideoTimeline(prompts, cuts, pipe.spec.cut_prefix)
            for prompts, cuts in zip(self.plan.prompts, self.plan.cuts, strict=True)
        ]
        self._video = video
        self._size = pipe.size_of(self._scripts)
        self.notes += pipe.cache_notes(len(self._scripts), self._size)
        if video is not None:
            self.notes += pipe.check_video(video, self._scripts, self._size)
        self._negative = pipe.negative_prompts(self._scripts)
        self._chunks = self._run()
        for note in pipe.truncations(self.plan):
            warnings.warn(note, stacklevel=3)

    def __next__(self) -> UInt8[np.ndarray, "b f h w 3"]:
        frames, self.latents = next(self._chunks)
        self.made += 1
        return frames

    def close(self) -> None:
        """Ends the stream and frees its cache."""
        self._chunks.close()

    def steer(
        self, prompt: str | None = None, *, cut: bool = False, video: int | None = None
    ) -> None:
        """Leaves the script: the next chunk not yet begun shows `prompt`, and so do those after it.

        With `cut` a new shot begins there (its prefix is added); without, the shot goes on. No
        prompt means the one before. `video` picks one of the batch, default all. The next chunk
        not yet begun is `ahead` chunks after the next one to be handed out.
        """
        if prompt is not None and not prompt.strip():
            raise ValueError("the prompt is empty; leave it out to keep the one before")
        lanes = self._lanes if video is None else [self._lanes[video]]
        if prompt is not None:
            for note in self._pipe.tokenizer_notes([prompt]):
                warnings.warn(note, stacklevel=2)
        for lane in lanes:
            lane.steer(prompt, cut=cut)

    def _orders(self) -> Iterator[ChunkInputs]:
        pipe, count = self._pipe, itertools.count() if self._endless else range(self.plan.chunks)
        for chunk in count:
            first = chunk == 0 and self._video is None
            rows = [lane.next(first=first) for lane in self._lanes]
            prompts, cuts, shots = zip(*rows, strict=True)
            yield ChunkInputs(
                text=pipe.words((*prompts, *self._negative)),
                cut=np.array(cuts),
                shot_rope_offset=np.array(shots, np.int32) * np.int32(pipe.spec.shot_rope_offset),
            )

    def _run(self) -> Generator[tuple[np.ndarray, Array], None, None]:
        pipe = self._pipe
        setting = pipe.setting(self._scripts, self._size)
        cache = pipe.cache(len(self._scripts), self._size)
        decode = pipe.codec.decoder()
        if self._video is not None:
            for past in pipe.encode_video(self._video, self._size):
                cache = pipe.sampler.write_context(pipe.params, cache, setting, self._past(), past)
                decode(past)  # only for what the decoder remembers
        latents = pipe.sampler.stream(pipe.params, cache, setting, self._orders())
        yield from overlapped(latents, decode, ahead=pipe.spec.ahead)

    def _past(self) -> ChunkInputs:
        """What is said about the chunks of a given video: the script's first prompt."""
        batch = len(self._scripts)
        prompts = [row[0] for row in self.plan.prompts]
        text = self._pipe.words((*prompts, *self._negative))
        return ChunkInputs(
            text=text, cut=np.zeros(batch, bool), shot_rope_offset=np.zeros(batch, np.int32)
        )
