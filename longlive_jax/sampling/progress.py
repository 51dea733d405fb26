"""What `Pipeline.sample` tells its caller after each chunk."""

import dataclasses

from longlive_jax.sampling.dispatch import Chunk
from longlive_jax.sampling.timeline import Timeline


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a call has come.

    Attributes:
      chunk: index of the chunk that is finished, from 0.
      num_chunks: chunks of the longest video.
      frames: frames finished so far, of each video.
      seconds: their duration in seconds of video.
      prompts: the chunk's prompt for each video, with the cut prefix where a shot begins.
      cuts: whether a new shot begins with the chunk, for each video.
    """

    chunk: int
    num_chunks: int
    frames: int
    seconds: float
    prompts: tuple[str, ...]
    cuts: tuple[bool, ...]

    @property
    def fraction(self) -> float:
        """Finished share of the chunks, in (0, 1]."""
        return (self.chunk + 1) / self.num_chunks


def progress_after(chunk: Chunk, timeline: Timeline) -> Progress:
    """The progress when `chunk` is finished."""
    frames = timeline.num_frames(chunk.index + 1)
    return Progress(
        chunk=chunk.index,
        num_chunks=timeline.num_chunks,
        frames=frames,
        seconds=frames / timeline.fps,
        prompts=chunk.prompt,
        cuts=tuple(map(bool, chunk.cut)),
    )
