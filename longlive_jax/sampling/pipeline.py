"""From scripts to frames: text encoder, sampler and VAE of one checkpoint.

The shortest use:

    pipe = Pipeline.from_checkpoint("longlive_jax/assets/small_world")
    script = ShotScript.of("a red circle drifts left", "a blue square rises", seconds=4)
    frames = pipe.sample(script)

or `for chunk_frames in pipe.stream(script): ...`, to have them as they are made.
"""

import copy
import dataclasses
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.diffusion.solvers import SOLVERS
from longlive_jax.io.checkpoint import TOKENIZER
from longlive_jax.io.models import load_model
from longlive_jax.io.pictures import read_image, to_pixels
from longlive_jax.models.params import params_of
from longlive_jax.models.umt5 import UMT5
from longlive_jax.models.umt5.prompts import encode_prompts
from longlive_jax.models.umt5.tokenizer import Tokenizer
from longlive_jax.models.vae import VAE
from longlive_jax.models.wan import DiT, TextKV
from longlive_jax.models.wan.cache import KVCache, empty_cache
from longlive_jax.models.wan.packed_cache import Packed
from longlive_jax.quant.packed import describe_kernels
from longlive_jax.sampling.drivers import ChunkInputs, Sampler, VideoConditioning
from longlive_jax.sampling.load import load_dit
from longlive_jax.sampling.script import ShotScript, check_size
from longlive_jax.sampling.settings import SampleSpec, precision, spec_for
from longlive_jax.sampling.stream import Stream
from longlive_jax.sampling.streaming_vae import Codec
from longlive_jax.sampling.timeline import Plan, plan
from longlive_jax.spec import UserError, build
from longlive_jax.typing import Array, Float, UInt8
from pallas_kernels.attention import AttentionFn, attention
from pallas_kernels.attention.packed_kv import select_packed_implementation
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.nvfp4 import NVFP4

KEPT_PROMPTS = 24
"""Prompts whose keys and values stay at hand; the least recently used goes first."""

LOADED_WITH = frozenset({"dtype", "vae_dtype", "vae_device", "quant"})
"""Settings that the weights are loaded with; they stay."""

type Scripts = ShotScript | Sequence[ShotScript]


class Pipeline:
    """A model ready to sample; everything is compiled once, at first use."""

    def __init__(
        self,
        dit: DiT,
        vae: VAE,
        umt5: UMT5,
        tokenizer: Tokenizer,
        spec: SampleSpec,
        *,
        attend: AttentionFn = attention,
    ):
        if dit.cfg.in_channels != vae.cfg.z_dim or dit.cfg.text_dim != umt5.cfg.dim:
            raise UserError(
                f"these parts do not fit: the DiT takes {dit.cfg.in_channels} channels and text of "
                f"width {dit.cfg.text_dim}, the VAE has {vae.cfg.z_dim}, the text encoder "
                f"{umt5.cfg.dim}"
            )
        self.spec, self.cfg = spec, dit.cfg
        self.params = params_of(dit)
        self.sampler = Sampler(nnx.graphdef(dit), attend=attend)
        device = None if spec.vae_device is None else jax.devices()[spec.vae_device]
        self.codec = Codec(vae, device)
        self._umt5, self._tokenizer = umt5, tokenizer
        self._prompts: OrderedDict[str, TextKV] = OrderedDict()
        self._rows: tuple[tuple[str, ...], TextKV] | None = None

    @classmethod
    def from_checkpoint(cls, folder: str | os.PathLike, **settings: Any) -> "Pipeline":
        """Loads a checkpoint directory; `settings` are fields of `SampleSpec`.

        Settings not given are the checkpoint's own. Raises UserError for a missing, foreign or
        damaged directory and for settings that are wrong.
        """
        spec = spec_for(folder, settings)
        dtype, vae_dtype = precision(spec.dtype), precision(spec.vae_dtype)
        tokenizer = Tokenizer(Path(folder) / TOKENIZER)
        dit = load_dit(folder, spec.quant, param_dtype=dtype, dtype=dtype)
        umt5 = load_model(folder, "umt5", param_dtype=dtype, dtype=dtype)
        vae = load_model(folder, "vae", param_dtype=vae_dtype, dtype=vae_dtype)
        return cls(dit, vae, umt5, tokenizer, spec)

    def with_settings(self, **changes: Any) -> "Pipeline":
        """The same weights and compiled functions, sampling with other settings.

        Precision and the VAE's device are what the weights were loaded with, and stay.
        """
        if fixed := LOADED_WITH & set(changes):
            raise UserError(f"{', '.join(sorted(fixed))} cannot change after loading; load again")
        other = copy.copy(self)
        other.spec = build(SampleSpec, dataclasses.asdict(self.spec) | changes, path="sample")
        return other

    def describe_kernels(self) -> tuple[str, ...]:
        """One line for each kind of packed matrix of the DiT, and what multiplies it."""
        return describe_kernels(self.params)

    def sample(self, scripts: Scripts, **options: Any) -> UInt8[np.ndarray, "b f h w 3"]:
        """All frames of one script or a batch of them; `options` as in `stream`.

        Videos that are shorter than the longest are padded; frames beyond
        `plan.frames(plan.lengths[i])` are not part of video i.
        """
        return np.concatenate(list(self.stream(scripts, **options)), axis=1)

    def stream(
        self,
        scripts: Scripts,
        *,
        video: np.ndarray | None = None,
        endless: bool = False,
    ) -> Stream:
        """An iterator of decoded chunks that can be steered; mistakes raise before it compiles.

        `video` (`[f, h, w, 3]` or `[b, f, h, w, 3]`, uint8 or in [-1, 1]) is continued: the frames
        that come out follow its last one. `endless` goes on with the last prompt for ever.
        """
        if video is not None and video.ndim == 4:
            video = video[None]
        return Stream(self, _listed(scripts), video=video, endless=endless)

    def latents(self, scripts: Scripts) -> Float[Array, "b f h w c"]:
        """The same video as `stream`, as latents and by one scan."""
        scripts = _listed(scripts)
        laid, size = self.plan(scripts), self.size_of(scripts)
        distinct, index = laid.distinct()
        negative = self.negative_prompts(scripts)
        texts = [*dict.fromkeys((*distinct, *negative))]
        rest = np.array([texts.index(prompt) for prompt in negative], np.int32)
        orders = ChunkInputs(
            text=np.stack([np.concatenate([column, rest]) for column in index.T]),
            cut=laid.cuts.T,
            shot_rope_offset=laid.offsets(self.spec.shot_rope_offset).T,
        )
        latents, _ = self.sampler.sample(
            self.params,
            self.cache(len(scripts), size),
            self.setting(scripts, size),
            orders,
            self.words(tuple(texts)),
        )
        return latents

    def plan(self, scripts: Sequence[ShotScript]) -> Plan:
        """The scripts laid out over chunks."""
        spec, stride = self.spec, self.codec.cfg.temporal_stride
        return plan(
            scripts,
            chunk_frames=spec.chunk_frames,
            temporal_stride=stride,
            fps=spec.fps,
            prefix=spec.cut_prefix,
        )

    def size_of(self, scripts: Sequence[ShotScript]) -> tuple[int, int]:
        """Height and width that all scripts agree on; UserError if they do not."""
        sizes = {self.spec.size if script.size is None else script.size for script in scripts}
        if len(sizes) > 1:
            raise UserError(f"the videos of a batch differ in size: {sorted(sizes)}; sample apart")
        (size,) = sizes
        check_size(*size, multiple=2 * self.codec.cfg.spatial_stride)
        return size

    def truncations(self, laid: Plan) -> tuple[str, ...]:
        """One remark for every prompt that is longer than the text encoder reads."""
        return self.tokenizer_notes(laid.distinct()[0])

    def tokenizer_notes(self, prompts: Sequence[str]) -> tuple[str, ...]:
        """As `truncations`, of prompts."""
        cut = self._tokenizer.truncations(prompts, self.cfg.text_len)
        return tuple(map(str, cut))

    def negative_prompts(self, scripts: Sequence[ShotScript]) -> tuple[str, ...]:
        """One a video with guidance, none without."""
        if self.spec.guidance == 1:
            return ()
        given = (script.negative_prompt for script in scripts)
        return tuple(self.spec.negative_prompt if text is None else text for text in given)

    def words(self, prompts: tuple[str, ...]) -> TextKV:
        """Keys and values of prompts in every layer, one prompt a row; each is computed once."""
        if self._rows is None or self._rows[0] != prompts:
            rows = [self._prompt(prompt) for prompt in prompts]
            joined = rows[0]
            if len(rows) > 1:
                joined = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *rows)
            self._rows = prompts, joined
        return self._rows[1]

    def _prompt(self, prompt: str) -> TextKV:
        if prompt not in self._prompts:
            length = self.cfg.text_len
            features = encode_prompts(self._umt5, self._tokenizer, [prompt], length=length)
            self._prompts[prompt] = self.sampler.text(self.params, features)
        self._prompts.move_to_end(prompt)
        while len(self._prompts) > KEPT_PROMPTS:
            self._prompts.popitem(last=False)
        return self._prompts[prompt]

    def cache(self, batch: int, size: tuple[int, int]) -> KVCache:
        """An empty cache for a batch of videos, doubled if there is guidance."""
        rows, columns = (edge // self.codec.cfg.spatial_stride // 2 for edge in size)
        copies = 1 if self.spec.guidance == 1 else 2
        shape = (self.spec.chunk_frames, rows, columns)
        return empty_cache(self.cfg, copies * batch, shape, self.spec.policy)

    def cache_notes(self, batch: int, size: tuple[int, int]) -> tuple[str, ...]:
        """What a packed cache takes and what reads it; nothing if it is not packed.

        Raises UserError for a model whose heads cannot be packed and for a kernel not to be had.
        """
        form = self.spec.policy.format
        if not form.packed:
            return ()
        cache = jax.eval_shape(lambda: self.cache(batch, size))
        if form.reader == "mosaic":
            self._check_reader(batch, size)
        reader = {"auto": "unpacked a layer at a time", "mosaic": "read by the kernel"}[form.reader]
        bf16 = cache.nbytes * cache.compression
        return (
            f"keys and values of the window are NVFP4 ({form.smoothing}), {reader}: "
            f"{cache.nbytes / 1e6:.2f} MB, {cache.compression:.2f} times less than the "
            f"{bf16 / 1e6:.2f} MB of bfloat16",
        )

    def _check_reader(self, batch: int, size: tuple[int, int]) -> None:
        keys, offset = jax.eval_shape(lambda: _keys(self.cache(batch, size)))
        try:
            select_packed_implementation(
                jax.ShapeDtypeStruct((batch, 1, *keys.shape[-2:]), self.cfg.dtype),
                keys, offset, implementation="mosaic",
            )  # fmt: skip
        except Unsupported as why:
            raise UserError(f"kv_reader=mosaic: {why}") from why

    def setting(self, scripts: Sequence[ShotScript], size: tuple[int, int]) -> VideoConditioning:
        """Solver, seeds, guidance and given first frames of a batch."""
        spec, ratio = self.spec, self.codec.cfg.spatial_stride
        empty = jnp.zeros((1, size[0] // ratio, size[1] // ratio, self.cfg.in_channels))
        first = [
            empty if script.image is None else self._image(script.image, size) for script in scripts
        ]
        return VideoConditioning(
            solver=SOLVERS[spec.solver](spec.steps, shift=spec.shift),
            keys=jnp.stack([jax.random.key(script.seed) for script in scripts]),
            first=jnp.concatenate(first),
            given=np.array([script.image is not None for script in scripts]),
            guidance=None if spec.guidance == 1 else float(spec.guidance),
        )

    def _image(self, path: str, size: tuple[int, int]) -> Float[Array, "1 h w c"]:
        return self.codec.encode(read_image(path, size)[None, None])[:, 0]

    def check_video(
        self, video: np.ndarray, scripts: Sequence[ShotScript], size: tuple[int, int]
    ) -> tuple[str, ...]:
        """Remarks about a video to be continued; UserError if that is impossible."""
        if video.ndim != 5 or video.shape[0] != len(scripts) or video.shape[2:] != (*size, 3):
            raise UserError(
                f"the video to continue is {video.shape}; expected [{len(scripts)}, frames, "
                f"{size[0]}, {size[1]}, 3]"
            )
        if any(script.image is not None for script in scripts):
            raise UserError("a script with an image cannot continue a video; choose one of the two")
        frames, kept = video.shape[1], self._kept_frames(video.shape[1])
        if kept < 1:
            least = self.codec.cfg.num_raw_frames(self.spec.chunk_frames)
            raise UserError(f"the video to continue has {frames} frames; at least {least} needed")
        if kept < frames:
            return (f"the first {frames - kept} frames are left out: no whole chunk",)
        return ()

    def encode_video(
        self, video: np.ndarray, size: tuple[int, int]
    ) -> Iterator[Float[Array, "b f h w c"]]:
        """Latents of a given video in chunks, its end aligned with the end of a chunk."""
        clip = video[:, video.shape[1] - self._kept_frames(video.shape[1]) :]
        pixels = to_pixels(clip) if clip.dtype == np.uint8 else clip.astype(np.float32)
        latents = self.codec.encode(pixels, chunk_frames=self.spec.chunk_frames)
        for at in range(0, latents.shape[1], self.spec.chunk_frames):
            yield latents[:, at : at + self.spec.chunk_frames]

    def _kept_frames(self, frames: int) -> int:
        """Frames in the longest end of a video that is a whole number of chunks."""
        ratio, chunk_frames = self.codec.cfg.temporal_stride, self.spec.chunk_frames
        chunks = (frames - 1 + ratio) // (ratio * chunk_frames)
        return self.codec.cfg.num_raw_frames(chunks * chunk_frames) if chunks else 0


def _keys(cache: KVCache) -> tuple[NVFP4, Array | None]:
    assert isinstance(cache.k, Packed)
    return cache.k.array, cache.k.offset


def _listed(scripts: Scripts) -> list[ShotScript]:
    return [scripts] if isinstance(scripts, ShotScript) else list(scripts)
