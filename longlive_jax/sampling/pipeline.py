"""From scripts to frames in one call.

    pipe = Pipeline.from_checkpoint("longlive_jax/assets/small_world")
    script = ShotScript.of("a red circle drifts left", "a blue square rises", seconds=4)
    frames = pipe.sample(script)

or `for chunk in pipe.stream(script): ...`, to get each chunk as soon as it is generated.
"""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from longlive_jax.quant.packed import describe_kernels
from longlive_jax.sampling.engine import Engine
from longlive_jax.sampling.script import ShotScript
from longlive_jax.sampling.settings import SampleSpec
from longlive_jax.sampling.stream import Stream
from longlive_jax.typing import Array, Float, UInt8

type Scripts = ShotScript | Sequence[ShotScript]


class Pipeline:
    """An `Engine` with the calls that take scripts.

    Attributes:
      engine: the model and its compiled functions.
    """

    def __init__(self, engine: Engine):
        self.engine = engine

    @classmethod
    def from_checkpoint(cls, folder: str | os.PathLike, **settings: Any) -> "Pipeline":
        """Loads a checkpoint directory; `settings` are fields of `SampleSpec`.

        Other settings are the checkpoint's own. Raises UserError for a missing, foreign or damaged
        directory and for invalid settings.
        """
        return cls(Engine.from_checkpoint(folder, **settings))

    @property
    def spec(self) -> SampleSpec:
        """The sampling settings."""
        return self.engine.spec

    def with_settings(self, **changes: Any) -> "Pipeline":
        """The same weights and compiled functions, sampling with other settings.

        Raises UserError for settings that apply when weights are loaded: precision, the VAE's
        device, quantization.
        """
        return Pipeline(self.engine.with_settings(**changes))

    def describe_kernels(self) -> tuple[str, ...]:
        """One line per kind of packed matrix of the DiT, with what multiplies it."""
        return describe_kernels(self.engine.params)

    def sample(self, scripts: Scripts, **options: Any) -> UInt8[np.ndarray, "b f h w 3"]:
        """All frames of one script or a batch of them; `options` as in `stream`.

        Videos shorter than the longest are padded: frames from
        `timeline.num_frames(timeline.lengths[i])` on are not part of video i.
        """
        return np.concatenate([chunk.frames for chunk in self.stream(scripts, **options)], axis=1)

    def stream(
        self, scripts: Scripts, *, video: np.ndarray | None = None, endless: bool = False
    ) -> Stream:
        """An iterator of decoded chunks that can be steered.

        `video` (`[f, h, w, 3]` or `[b, f, h, w, 3]`, uint8 or in [-1, 1]) is continued: the stream
        begins after its last frame. `endless` repeats the last prompt for ever. Raises UserError
        for scripts, sizes and videos that do not fit, before anything compiles.
        """
        engine, scripts = self.engine, _as_list(scripts)
        if video is not None and video.ndim == 4:
            video = video[None]
        # 1. Checks and notes.
        timeline = engine.timeline(scripts)
        truncations = engine.truncations(timeline.distinct_prompts()[0])
        size = engine.size_of(scripts)
        notes = (*timeline.notes, *truncations, *engine.cache_notes(len(scripts), size))
        if video is not None:
            notes += engine.check_video(video, scripts, size)
        for note in truncations:
            warnings.warn(note, stacklevel=2)
        # 2. The stream.
        return Stream(
            engine,
            timeline,
            engine.conditioning(scripts, size),
            negative_prompts=engine.negative_prompts(scripts),
            video=video,
            endless=endless,
            notes=notes,
        )

    def latents(self, scripts: Scripts) -> Float[Array, "b f h w c"]:
        """The video of `stream` as latents, by one scan over all chunks."""
        return self.engine.sample_latents(_as_list(scripts))


def _as_list(scripts: Scripts) -> list[ShotScript]:
    return [scripts] if isinstance(scripts, ShotScript) else list(scripts)
