"""From scripts to frames in one call.

    pipe = Pipeline.from_checkpoint()
    frames = pipe.sample("a red circle moves left on a mint background", seconds=4)

or `for chunk in pipe.stream(script): ...`, to get each chunk as soon as it is generated.
"""

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from longlive_jax.quant.packed import describe_kernels
from longlive_jax.sampling.continuation import PastVideo, make_past_video
from longlive_jax.sampling.dispatch import Output, SamplerDiverged
from longlive_jax.sampling.engine import Engine
from longlive_jax.sampling.inputs import (
    Scripts,
    as_scripts,
    check_callback,
    check_flag,
    check_output,
    checked_features,
    checked_latents,
    find_device,
    reject_arguments,
)
from longlive_jax.sampling.plugged import Adapters, AdapterSource, as_adapters
from longlive_jax.sampling.progress import Progress, progress_after
from longlive_jax.sampling.script import ShotScript
from longlive_jax.sampling.settings import SampleSpec, SolverName
from longlive_jax.sampling.sharding import check_divides, data_mesh
from longlive_jax.sampling.stream import PACKAGE, Stream
from longlive_jax.sampling.timeline import Timeline
from longlive_jax.spec import UserError
from longlive_jax.typing import Array, Float, Params, Shaped


class PastOptions(TypedDict, total=False):
    """A video to be continued, as options of `Pipeline.stream` and `Pipeline.sample`.

    Attributes:
      video: its frames, `[f, h, w, 3]` or `[b, f, h, w, 3]`, uint8 or in [-1, 1].
      video_latents: its latents, in place of frames.
      video_cuts: index of the first frame of every shot of it but the first.
      video_prompts: prompt of every shot of it; default the first prompt of the script.
    """

    video: Any
    video_latents: Any
    video_cuts: Sequence[int]
    video_prompts: Sequence[str] | None


class StreamOptions(PastOptions, total=False):
    """Options of `Pipeline.stream` and `Pipeline.sample`.

    Attributes:
      seconds: duration of each shot given as a prompt, by default 4.
      chunks: the same in chunks.
      steps: model calls per chunk, for this call.
      guidance: scale of classifier-free guidance, for this call.
      solver: solver of the flow, for this call.
      seed: seed in place of the scripts' own; video i of a batch gets `seed + i`.
      features: text features by prompt, as from `encode_prompts`, in place of the text encoder.
      endless: whether the last prompt repeats for ever.
    """

    seconds: float | None
    chunks: int | None
    steps: int | None
    guidance: float | None
    solver: SolverName | None
    seed: int | None
    features: Mapping[str, Any] | None
    endless: bool


class Pipeline:
    """An `Engine` with the calls that take scripts.

    Scripts are a prompt (a video of one shot), a list of prompts (a video with a shot for each), a
    `ShotScript`, or a list of these (a batch of videos). Several threads may use a pipeline at
    once.

    Attributes:
      engine: the model and its compiled functions.
      adapters: the adapters that are plugged in.
    """

    def __init__(self, engine: Engine, *, chosen: Iterable[str] = ()):
        """`chosen` names settings of the engine that plugging an adapter in leaves as they are."""
        if not isinstance(engine, Engine):
            raise TypeError(f"engine must be an Engine, got {type(engine).__name__}")
        self.engine = engine
        self.adapters = Adapters(engine, chosen=frozenset(chosen))

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | os.PathLike | None = None,
        *,
        device: jax.Device | int | None = None,
        mesh: Mesh | None = None,
        **settings: Any,
    ) -> "Pipeline":
        """Loads a checkpoint directory; None is the built-in one.

        Args:
          folder: checkpoint directory, or the name of a built-in one.
          device: device of all models, itself or its index; default JAX's default device.
          mesh: devices that share the videos of a batch along the axis `data`; each has all models.
          **settings: fields of `SampleSpec`; others are the checkpoint's own.

        Raises UserError for a missing, foreign or damaged directory, a device that does not exist,
        and invalid settings.
        """
        target, devices = find_device(device), None if mesh is None else data_mesh(mesh)
        if devices is not None and (target is not None or settings.get("vae_device") is not None):
            raise UserError("mesh says where all models are; leave device and vae_device out")
        engine = Engine.from_checkpoint(folder, device=target, mesh=devices, **settings)
        return cls(engine, chosen=settings)

    def __repr__(self) -> str:
        spec, device, mesh = self.spec, self.engine.device, self.engine.mesh
        more = f" and {mesh.size - 1} more" if mesh is not None and mesh.size > 1 else ""
        size = f"{spec.size[0]}x{spec.size[1]}"
        return (
            f"Pipeline({size} at {spec.fps:g} fps, chunks of {spec.chunk_frames} latents, "
            f"{spec.solver} with {spec.steps} steps, guidance {spec.guidance:g}, "
            f"{device.platform}:{device.id}{more})"
        )

    @property
    def spec(self) -> SampleSpec:
        """The sampling settings."""
        return self.engine.spec

    def with_settings(self, **changes: Any) -> "Pipeline":
        """The same weights and compiled functions, sampling with other settings.

        Raises UserError for settings that apply when weights are loaded: precision, the VAE's
        device, quantization.
        """
        adapters = dataclasses.replace(
            self.adapters,
            plain=self.adapters.plain.with_settings(**changes),
            chosen=self.adapters.chosen | set(changes),
        )
        return self._with(adapters, self.engine.params)

    def with_adapter(
        self,
        adapter: AdapterSource | Sequence[AdapterSource],
        scale: float | Sequence[float] = 1.0,
        *,
        rank: int | None = None,
    ) -> "Pipeline":
        """The pipeline with an adapter plugged in, or with several; calls add up.

        The adapter's own sampling settings are set, except those given to `from_checkpoint` or
        `with_settings`. Nothing compiles again as long as the ranks of all adapters fit into the
        branches, whose rank is a power of two and never shrinks. A fused pipeline stays fused.

        Args:
          adapter: adapter, its path, or a list of these.
          scale: what its own scale is multiplied by; one for each of a list, or one for all.
          rank: total rank to make room for, if more adapters will follow.

        Raises UserError for a missing or damaged file, an adapter of another model, and values that
        are not finite.
        """
        return self._plugged(self.adapters.added(as_adapters(adapter, scale), rank))

    def without_adapters(self) -> "Pipeline":
        """The pipeline with its own weights and settings."""
        return self._plugged(dataclasses.replace(self.adapters, plugged=(), fused=False))

    def fuse_adapters(self) -> "Pipeline":
        """The pipeline with the adapters merged into its kernels, as fast as without any.

        The unmerged kernels stay in memory for `unfuse_adapters`. Raises UserError if nothing is
        plugged in, or the kernels are packed.
        """
        if not self.adapters.plugged:
            raise UserError("there is no adapter to fuse; plug one in with with_adapter")
        return self._plugged(dataclasses.replace(self.adapters, fused=True))

    def unfuse_adapters(self) -> "Pipeline":
        """The pipeline with the same adapters as branches again; kernels are exactly as before."""
        return self._plugged(dataclasses.replace(self.adapters, fused=False))

    def _plugged(self, adapters: Adapters) -> "Pipeline":
        return self._with(adapters, adapters.params())

    def _with(self, adapters: Adapters, params: Params) -> "Pipeline":
        pipe = Pipeline(adapters.engine(params, self.engine))
        pipe.adapters = adapters
        return pipe

    def describe_kernels(self) -> tuple[str, ...]:
        """One line per kind of packed matrix of the DiT, with what multiplies it."""
        return describe_kernels(self.engine.params)

    def sample(
        self,
        scripts: Scripts,
        *,
        callback: Callable[[Progress], object] | None = None,
        output: Output = "uint8",
        **options: Unpack[StreamOptions],
    ) -> Shaped[np.ndarray, "b f h w c"]:
        """All frames of one script or a batch of them.

        Args:
          scripts: what to show; see the class.
          callback: called after each chunk. What it raises ends the call.
          output: "uint8" frames; "float" for float32 frames in [-1, 1]; "latents" for float32
            latents, which are not decoded.
          **options: as in `stream`, except `endless`.

        Videos shorter than the longest are padded: frames from
        `timeline.num_frames(timeline.lengths[i])` on are not part of video i. Raises
        SamplerDiverged if values are not finite.
        """
        check_callback(callback)
        if options.get("endless"):
            raise UserError("an endless video has no last frame for sample to return; use stream")
        chunks = []
        with contextlib.closing(self.stream(scripts, output=output, **options)) as stream:
            for chunk in stream:
                chunks.append(np.asarray(chunk.latents) if output == "latents" else chunk.frames)
                if callback is not None:
                    callback(progress_after(chunk, stream.timeline))
        return np.concatenate(chunks, axis=1)

    def stream(
        self,
        scripts: Scripts,
        *,
        seconds: float | None = None,
        chunks: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        solver: SolverName | None = None,
        seed: int | None = None,
        features: Mapping[str, Any] | None = None,
        endless: bool = False,
        output: Output = "uint8",
        **past: Unpack[PastOptions],
    ) -> Stream:
        """An iterator of decoded chunks that can be steered; see `StreamOptions`, `PastOptions`.

        One that continues a video begins after its last frame. Raises TypeError or UserError for
        arguments that do not fit, before anything compiles.
        """
        # 1. Arguments.
        check_output(output)
        check_flag("endless", endless)
        batch = as_scripts(scripts, seconds=seconds, chunks=chunks, seed=seed)
        engine = self._engine_for(features, steps=steps, guidance=guidance, solver=solver)
        check_divides(engine.mesh, len(batch))
        size = engine.size_of(batch)
        video = _past(engine, batch, size, past)
        timeline = engine.timeline(batch, past_shots=0 if video is None else video.num_shots)
        # 2. Notes.
        remarks = self._remarks(engine, batch, timeline)
        notes = (*timeline.notes, *remarks, *engine.cache_notes(len(batch), size))
        for note in remarks:
            warnings.warn(note, skip_file_prefixes=PACKAGE)
        # 3. The stream.
        return Stream(
            engine,
            timeline,
            engine.conditioning(batch, size),
            negative_prompts=engine.negative_prompts(batch),
            past=video,
            endless=endless,
            output=output,
            notes=(*notes, *(() if video is None else video.notes)),
        )

    def latents(self, scripts: Scripts) -> Float[Array, "b f h w c"]:
        """The video of `stream` as latents, by one scan over all chunks (without a mesh)."""
        if self.engine.mesh is not None:
            return jnp.asarray(self.sample(scripts, output="latents"))
        return self.engine.sample_latents(as_scripts(scripts))

    def decode(
        self, latents: Float[Array | np.ndarray, "b f h w c"], *, output: Output = "uint8"
    ) -> Shaped[np.ndarray, "b g h2 w2 3"]:
        """Frames of latents, which may lack the axis of videos: g = 1 + 4 (f - 1).

        The latents of `sample` give its frames bit for bit. Raises UserError for latents that do
        not fit the VAE or are not finite.
        """
        check_output(output)
        if output == "latents":
            raise UserError('decode gives frames; output must be "uint8" or "float"')
        array, engine = checked_latents(latents, self.engine.vae.cfg.z_dim), self.engine
        state, chunk_frames = engine.decoder_state(), self.spec.chunk_frames
        frames = []
        for start in range(0, array.shape[1], chunk_frames):
            chunk = jnp.asarray(array[:, start : start + chunk_frames])
            decoded, is_finite, state = engine.decode(state, chunk, as_float=output == "float")
            frames.append(np.asarray(decoded))
            if not bool(is_finite):
                raise SamplerDiverged("decoded frames are not finite; set vae_dtype to float32")
        return np.concatenate(frames, axis=1)

    def encode_prompts(self, prompts: str | Sequence[str]) -> dict[str, Float[Array, "t e"]]:
        """Text features by prompt, for the `features` of `sample` and `stream`.

        Every prompt is encoded as it is, and with the prefix that opens a shot after a cut. To use
        features of another source, give a dictionary of the same kind: `[tokens, width]` by prompt.
        A prompt with the prefix that has no features uses those without it.
        """
        given = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(given, Sequence) or not all(isinstance(text, str) for text in given):
            raise TypeError(f"prompts must be a string or a list of strings, got {prompts!r:.80}")
        prefix = self.spec.cut_prefix
        texts = dict.fromkeys(
            text for prompt in given for text in (prompt, prefix + prompt.removeprefix(prefix))
        )
        return {text: self.engine.text_features(text)[0] for text in texts}

    def _remarks(
        self, engine: Engine, batch: Sequence[ShotScript], timeline: Timeline
    ) -> tuple[str, ...]:
        """Notes on steps that an adapter was not made for, and on prompts."""
        prompts = timeline.distinct_prompts()[0]
        return self.adapters.remarks(engine.spec.steps) + _prompt_notes(engine, batch, prompts)

    def _engine_for(self, features: Mapping[str, Any] | None, **settings: Any) -> Engine:
        """The engine with the settings and text features of one call."""
        changes = {name: value for name, value in settings.items() if value is not None}
        engine = self.engine.with_settings(**changes) if changes else self.engine
        if features is None:
            return engine
        return engine.with_features(checked_features(features, engine.cfg))


def _past(
    engine: Engine, batch: Sequence[ShotScript], size: tuple[int, int], options: PastOptions
) -> PastVideo | None:
    """The video to be continued. Raises TypeError for options that do not exist."""
    reject_arguments(
        options, PastOptions.__annotations__, (*StreamOptions.__annotations__, "callback", "output")
    )
    past = make_past_video(
        engine,
        len(batch),
        size,
        video=options.get("video"),
        latents=options.get("video_latents"),
        cuts=options.get("video_cuts", ()),
        prompts=options.get("video_prompts"),
    )
    if past is not None and any(script.image is not None for script in batch):
        raise UserError("a script with an image cannot continue a video; use one of the two")
    return past


def _prompt_notes(
    engine: Engine, batch: Sequence[ShotScript], texts: Sequence[str]
) -> tuple[str, ...]:
    """Notes on prompts that are too long, and on each script's unknown words."""
    notes = list(engine.truncations(texts))
    for script in batch:
        name = f"{script.name}: " if len(batch) > 1 and script.name else ""
        words = engine.unknown_words([shot.prompt for shot in script.shots])
        notes += [name + note for note in words]
    return tuple(dict.fromkeys(notes))
