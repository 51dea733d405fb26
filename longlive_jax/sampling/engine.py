"""The engine: one model's parameters and compiled functions, used by any number of streams.

    engine = Engine.from_checkpoint("longlive_jax/assets/small_world")
    cache, decoder = engine.start(conditioning)
    latents, cache = engine.step(cache, conditioning, inputs)
    frames, is_finite, decoder = engine.decode(decoder, latents)

The state of a video (cache, decoder state, position in its script) is an argument and a result of
these calls; the engine has no state per video.
"""

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from longlive_jax.diffusion.solvers import SOLVERS
from longlive_jax.io.builtin import find_checkpoint
from longlive_jax.io.checkpoint import TOKENIZER
from longlive_jax.io.completeness import require_components
from longlive_jax.io.models import load_model
from longlive_jax.io.pictures import read_image
from longlive_jax.models.params import params_of, with_params
from longlive_jax.models.per_layer import is_unstacked
from longlive_jax.models.umt5 import UMT5
from longlive_jax.models.umt5.tokenizer import Tokenizer
from longlive_jax.models.vae import VAE
from longlive_jax.models.wan import DiT, TextKV
from longlive_jax.models.wan.cache import KVCache, empty_cache
from longlive_jax.models.wan.packed_cache import PackedTensor
from longlive_jax.sampling.drivers import ChunkInputs, Sampler, VideoConditioning
from longlive_jax.sampling.load import PLATFORMS_WITH_LAYERS_APART, layers_apart, load_dit
from longlive_jax.sampling.prompt_cache import PromptCache, PromptEncoder
from longlive_jax.sampling.script import ShotScript, check_size
from longlive_jax.sampling.settings import LOADED_WITH, SampleSpec, changed, precision, spec_for
from longlive_jax.sampling.sharding import REPLICATED, rows_by_device, shard_cache
from longlive_jax.sampling.streaming_vae import DecoderState, StreamingVAE
from longlive_jax.sampling.timeline import Timeline, make_timeline
from longlive_jax.spec import UserError, build
from longlive_jax.typing import Array, Bool, Float, Params, Shaped
from pallas_kernels.attention import AttentionFn, attention
from pallas_kernels.attention.packed_kv import select_packed_implementation
from pallas_kernels.dispatch import Unsupported


class Engine:
    """Parameters, compiled functions and cached prompts of one model.

    The DiT stays on the device of its parameters. The VAE shares it, or has a device of its own
    (`SampleSpec.vae_device`), and latents are copied between the two. Every function compiles once,
    at first use.

    Attributes:
      spec: sampling settings.
      cfg: configuration of the DiT.
      params: parameters of the DiT.
      sampler: jitted functions of the DiT, with parameters as arguments.
      vae: the jitted VAE.
      device: device of the DiT, its caches and its latents; the first of several.
      mesh: devices that share the videos of a batch, or None.
    """

    def __init__(
        self,
        dit: DiT,
        vae: VAE,
        umt5: UMT5,
        tokenizer: Tokenizer,
        spec: SampleSpec,
        *,
        attend: AttentionFn = attention,
        mesh: Mesh | None = None,
    ):
        """An engine on the device of the parameters, or on all devices of `mesh`.

        Raises UserError for parts of different models.
        """
        if dit.cfg.in_channels != vae.cfg.z_dim or dit.cfg.text_dim != umt5.cfg.dim:
            raise UserError(
                f"the parts of the model do not fit: the DiT takes {dit.cfg.in_channels} latent "
                f"channels and text of width {dit.cfg.text_dim}, the VAE has {vae.cfg.z_dim} "
                f"channels and the text encoder a width of {umt5.cfg.dim}"
            )
        self.spec, self.cfg = spec, dit.cfg
        self.params = params_of(dit)
        self.device = _device_of(self.params)
        self.mesh = mesh
        self.sampler = Sampler(nnx.graphdef(dit), attend=attend, mesh=mesh)
        vae_device = None if spec.vae_device is None else jax.devices()[spec.vae_device]
        self.vae = StreamingVAE(vae, vae_device, mesh)
        self._prompt_encoder = PromptEncoder(umt5, tokenizer, dit.cfg.text_len)
        self._features: Mapping[str, Float[Array, "t e"]] = {}
        self._prompt_cache = PromptCache(self._prompt_kv)

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | os.PathLike | None = None,
        *,
        device: jax.Device | None = None,
        mesh: Mesh | None = None,
        **settings: Any,
    ) -> "Engine":
        """Loads a checkpoint directory; None is the built-in one.

        `device` takes all models, default JAX's default device; `mesh` has a copy of them on each
        of its devices. `settings` are fields of `SampleSpec`; others are the checkpoint's own.
        Raises UserError for a missing, foreign or damaged directory and for invalid settings.
        """
        folder = find_checkpoint(folder)
        require_components(folder)
        spec = spec_for(folder, settings)
        dtype, vae_dtype = precision(spec.dtype), precision(spec.vae_dtype)
        tokenizer = Tokenizer(folder / TOKENIZER)
        with jax.default_device(device):
            dit = load_dit(folder, spec.quant, param_dtype=dtype, dtype=dtype)
            umt5 = load_model(folder, "umt5", param_dtype=dtype, dtype=dtype)
            vae = load_model(folder, "vae", param_dtype=vae_dtype, dtype=vae_dtype)
        target = device if mesh is None else NamedSharding(mesh, REPLICATED)
        if target is not None:
            dit, umt5, vae = (_committed(model, target) for model in (dit, umt5, vae))
        engine = cls(dit, vae, umt5, tokenizer, spec, mesh=mesh)
        if engine.device.platform in PLATFORMS_WITH_LAYERS_APART:
            engine.params = layers_apart(engine.params, consume=True)
        return engine

    def with_settings(self, **changes: Any) -> "Engine":
        """An engine with the same parameters, compiled functions and prompts but other settings.

        Raises UserError for settings that apply when weights are loaded (`LOADED_WITH`).
        """
        if fixed := LOADED_WITH & set(changes):
            raise UserError(f"{', '.join(sorted(fixed))} cannot change after loading; load again")
        engine = copy.copy(self)
        settings = changed(dataclasses.asdict(self.spec), changes)
        engine.spec = build(SampleSpec, settings, path="sample")
        return engine

    def with_params(self, params: Params) -> "Engine":
        """An engine with other DiT parameters and the same compiled functions.

        Its prompt cache is empty, because keys and values of prompts depend on the parameters.
        """
        engine = copy.copy(self)
        engine.params, engine.device = params, _device_of(params)
        engine._prompt_cache = PromptCache(engine._prompt_kv)
        return engine

    def with_features(self, features: Mapping[str, Float[Array, "t e"]]) -> "Engine":
        """An engine that takes these text features for prompts in place of its text encoder.

        A prompt with the cut prefix and without features of its own uses those without the prefix.
        Prompts that `features` lacks are encoded as before.
        """
        engine, own = copy.copy(self), self._prompt_cache

        def compute(prompt: str) -> TextKV:
            given = engine._features_of(prompt)
            return own[prompt] if given is None else self.sampler.text(self.params, given[None])

        engine._features, engine._prompt_cache = features, PromptCache(compute)
        return engine

    # --- Compiled functions ---

    def text_features(self, prompt: str) -> Float[Array, "1 t e"]:
        """Features of one prompt from the text encoder, zero beyond its tokens."""
        return self._prompt_encoder(prompt)

    def text_kv(self, prompts: Sequence[str]) -> TextKV:
        """Keys and values of prompts in every layer, one prompt per sample; cached by prompt."""
        entries = [self._prompt_cache[prompt] for prompt in prompts]
        if len(entries) == 1:
            return entries[0]
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *entries)

    def step(
        self, cache: KVCache, conditioning: VideoConditioning, inputs: ChunkInputs
    ) -> tuple[Float[Array, "b f h w c"], KVCache]:
        """Latents (float32) of the next chunk, and the cache after it; `cache` is donated."""
        return self.sampler.step(self.params, cache, conditioning, self._by_device(inputs))

    def write_context(
        self,
        cache: KVCache,
        conditioning: VideoConditioning,
        inputs: ChunkInputs,
        latents: Float[Array, "b f h w c"],
    ) -> KVCache:
        """The cache after a given chunk of latents; `cache` is donated."""
        inputs = self._by_device(inputs)
        return self.sampler.write_context(self.params, cache, conditioning, inputs, latents)

    def _by_device(self, inputs: ChunkInputs) -> ChunkInputs:
        """Inputs with the prompts in the order in which the devices of a mesh take them."""
        videos = len(inputs.cut)
        if self.mesh is None or self.spec.guidance == 1:
            return inputs
        order = rows_by_device(videos, self.mesh.size)
        text = jax.tree.map(lambda x: jnp.take(x, order, axis=1), inputs.text)
        return dataclasses.replace(inputs, text=text)

    def decode(
        self, state: DecoderState, latents: Float[Array, "b f h w c"], *, as_float: bool = False
    ) -> tuple[Shaped[Array, "b f h w 3"], Bool[Array, ""], DecoderState]:
        """Frames of the next chunk, whether they are finite, and the decoder's next state.

        Frames are uint8, or float32 in [-1, 1]. `state` is donated.
        """
        return self.vae.decode(state, latents, as_float=as_float)

    def encode(
        self, pixels: Float[np.ndarray, "b f h w 3"], *, chunk_frames: int | None = None
    ) -> Float[Array, "b g h w c"]:
        """Latents of 1 + 4n frames on the DiT's device; see `StreamingVAE.encode`."""
        return self.device_put(self.vae.encode(pixels, chunk_frames=chunk_frames))

    def encode_chunk(
        self, tails: Any, pixels: Float[np.ndarray, "b f h w 3"]
    ) -> tuple[Float[Array, "b g h w c"], Any]:
        """Latents of the next frames of a clip on the DiT's device, and the encoder's tails.

        See `StreamingVAE.encode_chunk`.
        """
        latents, tails = self.vae.encode_chunk(tails, pixels)
        return self.device_put(latents), tails

    def device_put(self, latents: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Latents on the DiT's device, which differs from the VAE's if that has its own."""
        return latents if self.spec.vae_device is None else jax.device_put(latents, self.device)

    def sample_latents(self, scripts: Sequence[ShotScript]) -> Float[Array, "b f h w c"]:
        """Latents of entire videos, by one scan over all chunks."""
        # 1. One bank of prompts, the negative ones included, and each chunk's indices into it.
        timeline, size = self.timeline(scripts), self.size_of(scripts)
        distinct, index = timeline.distinct_prompts()
        negative = self.negative_prompts(scripts)
        bank = [*dict.fromkeys((*distinct, *negative))]
        negative_index = np.array([bank.index(prompt) for prompt in negative], np.int32)
        inputs = ChunkInputs(
            text=np.stack([np.concatenate([column, negative_index]) for column in index.T]),
            cut=timeline.cuts.T,
            shot_rope_offset=timeline.shot_rope_offsets(self.spec.shot_rope_offset).T,
        )
        # 2. Scan.
        conditioning, cache = self.conditioning(scripts, size), self.cache(len(scripts), size)
        latents, _ = self.sampler.sample(
            self.params, cache, conditioning, inputs, self.text_kv(bank)
        )
        return latents

    # --- Scripts to inputs ---

    def timeline(self, scripts: Sequence[ShotScript], *, past_shots: int = 0) -> Timeline:
        """The scripts in chunks of this model; they continue a video of `past_shots` shots."""
        return make_timeline(
            scripts,
            chunk_frames=self.spec.chunk_frames,
            temporal_stride=self.vae.cfg.temporal_stride,
            fps=self.spec.fps,
            prefix=self.spec.cut_prefix,
            past_shots=past_shots,
        )

    def size_of(self, scripts: Sequence[ShotScript]) -> tuple[int, int]:
        """Height and width in pixels; UserError for different sizes and indivisible ones."""
        sizes = {self.spec.size if script.size is None else script.size for script in scripts}
        if len(sizes) > 1:
            raise UserError(
                f"the videos of a batch differ in size: {sorted(sizes)}; sample them separately"
            )
        (size,) = sizes
        check_size(*size, multiple=2 * self.vae.cfg.spatial_stride)
        return size

    def negative_prompts(self, scripts: Sequence[ShotScript]) -> tuple[str, ...]:
        """One per video with guidance, none without."""
        if self.spec.guidance == 1:
            return ()
        prompts = (script.negative_prompt for script in scripts)
        return tuple(self.spec.negative_prompt if text is None else text for text in prompts)

    def conditioning(
        self, scripts: Sequence[ShotScript], size: tuple[int, int]
    ) -> VideoConditioning:
        """Solver, seeds, guidance and conditioning frames of a batch."""
        spec, stride = self.spec, self.vae.cfg.spatial_stride
        empty = jnp.zeros((1, size[0] // stride, size[1] // stride, self.cfg.in_channels))
        images = [script.image for script in scripts]
        frames = [empty if image is None else self._image(image, size) for image in images]
        return VideoConditioning(
            solver=SOLVERS[spec.solver](spec.steps, shift=spec.shift, levels=spec.levels),
            keys=jnp.stack([jax.random.key(script.seed) for script in scripts]),
            conditioning_frame=jnp.concatenate(frames),
            has_conditioning_frame=np.array([image is not None for image in images]),
            guidance=None if spec.guidance == 1 else float(spec.guidance),
        )

    def cache(self, batch: int, size: tuple[int, int]) -> KVCache:
        """An empty cache for a batch of videos, twice as large with guidance."""
        rows, columns = (edge // self.vae.cfg.spatial_stride // 2 for edge in size)
        copies = 1 if self.spec.guidance == 1 else 2
        shape = (self.spec.chunk_frames, rows, columns)
        with jax.default_device(self.device):
            cache = empty_cache(
                self.cfg, copies * batch, shape, self.spec.policy,
                per_layer=is_unstacked(self.params["blocks"]),
            )  # fmt: skip
        return cache if self.mesh is None else shard_cache(self.mesh, cache)

    def start(self, conditioning: VideoConditioning) -> tuple[KVCache, DecoderState]:
        """The empty cache and the decoder state with which a batch of videos begins."""
        batch, *edges, _ = conditioning.conditioning_frame.shape
        height, width = (edge * self.vae.cfg.spatial_stride for edge in edges)
        return self.cache(batch, (height, width)), self.decoder_state()

    def decoder_state(self) -> DecoderState:
        """The state of the decoder before the first chunk of a video."""
        return DecoderState()

    # --- Notes for the user ---

    def truncations(self, prompts: Sequence[str]) -> tuple[str, ...]:
        """A note for each prompt that is longer than the text encoder reads."""
        return self._prompt_encoder.truncations(self._encoded_here(prompts))

    def unknown_words(self, prompts: Sequence[str]) -> tuple[str, ...]:
        """A note on the words that the text encoder does not know; none if it knows all."""
        return self._prompt_encoder.unknown_words(self._encoded_here(prompts))

    def prompt_notes(self, prompts: Sequence[str]) -> tuple[str, ...]:
        """Both kinds of notes."""
        return self.truncations(prompts) + self.unknown_words(prompts)

    def _encoded_here(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that the text encoder reads, without those whose features are given."""
        return [prompt for prompt in prompts if self._features_of(prompt) is None]

    def _features_of(self, prompt: str) -> Float[Array, "t e"] | None:
        """Given features of a prompt, or None."""
        plain = prompt.removeprefix(self.spec.cut_prefix)
        return self._features.get(prompt, self._features.get(plain))

    def cache_notes(self, batch: int, size: tuple[int, int]) -> tuple[str, ...]:
        """A note on the size and the reader of a packed cache; none for a cache of arrays.

        Raises UserError for heads that cannot be packed and for an unavailable kernel.
        """
        form = self.spec.policy.format
        if not form.packed:
            return ()
        cache = jax.eval_shape(lambda: self.cache(batch, size))
        if form.reader == "mosaic":
            self._check_reader(batch, size)
        reader = {"auto": "dequantized layer by layer", "mosaic": "read by the kernel"}[form.reader]
        bf16 = cache.nbytes * cache.compression
        return (
            f"keys and values of the window are NVFP4 ({form.smoothing}), {reader}: "
            f"{cache.nbytes / 1e6:.2f} MB, {cache.compression:.2f} times less than the "
            f"{bf16 / 1e6:.2f} MB of bfloat16",
        )

    def _check_reader(self, batch: int, size: tuple[int, int]) -> None:
        """UserError unless the Mosaic kernel runs here on this cache."""

        def keys():
            k = self.cache(batch, size).k
            assert isinstance(k, PackedTensor)
            return k.array, k.offset

        k, offset = jax.eval_shape(keys)
        q = jax.ShapeDtypeStruct((batch, 1, *k.shape[-2:]), self.cfg.dtype)
        try:
            select_packed_implementation(q, k, offset, implementation="mosaic")
        except Unsupported as error:
            raise UserError(f"kv_reader=mosaic: {error}") from error

    def _prompt_kv(self, prompt: str) -> TextKV:
        return self.sampler.text(self.params, self._prompt_encoder(prompt))

    def _image(self, path: str, size: tuple[int, int]) -> Float[Array, "1 h w c"]:
        return self.encode(read_image(path, size)[None, None])[:, 0]


def _committed[M: nnx.Module](model: M, device: jax.Device | NamedSharding) -> M:
    """The model with its parameters bound to a device or mesh, so that computations run there."""
    return with_params(model, jax.device_put(params_of(model), device))


def _device_of(params: Params) -> jax.Device:
    """The device with the parameters; the first one if they are on several."""
    devices = jax.tree.leaves(params)[0].devices()
    return min(devices, key=lambda device: device.id)
