"""One denoising call of a mid-size DiT against a full cache, and one chunk sampled with it.

The mid-size model is a baseline for other implementations of the same model: large enough that
arithmetic outweighs overhead, and small enough for two CPU cores.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from longlive_jax.bench.timing import Compilations, machine, peak_memory, repeated, report_settings
from longlive_jax.diffusion import solvers
from longlive_jax.models.params import params_of, with_params
from longlive_jax.models.per_layer import unstack
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.models.wan.cache import CachePolicy, KVCache, empty_cache
from longlive_jax.models.wan.dit import TextKV
from longlive_jax.sampling.chunk import ChunkRequest, sample_chunk
from longlive_jax.sampling.drivers import COMPILER_OPTIONS
from longlive_jax.sampling.load import PLATFORMS_WITH_LAYERS_APART, layers_apart


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallSpec:
    """The call and the chunk to time, for a single video.

    Attributes:
      model: configuration of the DiT.
      chunk_frames: latent frames per chunk.
      latent: height and width of the latents.
      window: chunks in the attention window, the current one included.
      steps: model calls per chunk, not counting the clean context pass.
      repeats: number of timed repetitions.
    """

    model: DiTConfig
    chunk_frames: int = 8
    latent: tuple[int, int] = (24, 40)
    window: int = 4
    steps: int = 4
    repeats: int = 5


MODEL_SPECS = {
    "mid": CallSpec(
        model=DiTConfig(
            dim=512,
            ffn_dim=2048,
            freq_dim=256,
            text_dim=512,
            text_len=512,
            heads=4,
            layers=8,
        )
    ),
    "5b": CallSpec(
        model=DiTConfig(dtype="bfloat16", param_dtype="bfloat16"), latent=(44, 80), repeats=10
    ),
}
"""What `longlive bench sampler --model=NAME` times, by name."""


def bench_call(spec: CallSpec) -> dict[str, Any]:
    """Times a call and a chunk with random weights; returns a report ready for JSON."""
    # 1. Model, full cache and inputs.
    about = machine()
    model = DiT(spec.model, rngs=nnx.Rngs(0))
    graphdef, params = nnx.graphdef(model), params_of(model)
    cache, text = full_cache(spec), prompt(spec)
    if jax.default_backend() in PLATFORMS_WITH_LAYERS_APART:
        params = layers_apart(params, consume=True)
        k, v = unstack((cache.k, cache.v), consume=True)
        cache = dataclasses.replace(cache, k=k, v=v)
    latents = jax.random.normal(
        jax.random.key(1), (1, spec.chunk_frames, *spec.latent, spec.model.in_channels)
    )
    level = jnp.full((1, spec.chunk_frames), 500.0)

    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def denoising_call(params, cache: KVCache, latents, text: TextKV):
        tokens = cache.upcoming(noisy=True)
        return with_params(graphdef, params)(latents, level, text, tokens, cache)[0]

    # 2. Times.
    with Compilations() as compiled:
        times = repeated(lambda: denoising_call(params, cache, latents, text), spec.repeats)
        chunk_times = repeated(_chunk(spec, graphdef, params, cache, text), spec.repeats)
    flops = call_flops(spec)
    return {
        "machine": about,
        "spec": _plain(spec),
        "seconds_per_call": times,
        "seconds_per_chunk": chunk_times,
        "frames_per_second": round(4 * spec.chunk_frames / chunk_times["median"], 2),
        "gflop": round(flops / 1e9, 1),
        "gflop_per_second": round(flops / 1e9 / times["median"], 1),
        "compilations": {k: compiled.counts[k] for k in ("denoising_call", "chunk_step")},
        "peak": peak_memory(),
    }


def _chunk(spec: CallSpec, graphdef, params, cache: KVCache, text: TextKV) -> Callable[[], Any]:
    """A function that samples the next chunk of a video; the cache is donated, as in sampling."""
    shape = (1, spec.chunk_frames, *spec.latent, spec.model.in_channels)
    solver = solvers.unipc(spec.steps)

    @functools.partial(jax.jit, donate_argnums=1, compiler_options=COMPILER_OPTIONS)
    def chunk_step(params, cache: KVCache, request: ChunkRequest):
        return sample_chunk(with_params(graphdef, params), cache, request, solver)

    request = ChunkRequest(
        noise=jax.random.normal(jax.random.key(1), shape),
        text_kv=text,
        cut=jnp.zeros(1, bool),
        shot_rope_offset=jnp.zeros(1, jnp.int32),
        fixed_latents=jnp.zeros(shape),
        is_fixed=jnp.zeros(shape[:2], bool),
        keys=jax.random.split(jax.random.key(2), 1),
    )
    state = [jax.tree.map(jnp.copy, cache)]

    def chunk() -> Any:
        latents, state[0] = chunk_step(params, state[0], request)
        return latents, state[0]

    return chunk


def full_cache(spec: CallSpec) -> KVCache:
    """A cache as in the middle of a video, with random keys and values in every slot."""
    size = (spec.chunk_frames, spec.latent[0] // 2, spec.latent[1] // 2)
    cache = empty_cache(spec.model, 1, size, CachePolicy(window=spec.window))
    k, v = (jax.random.normal(jax.random.key(i), cache.k.shape, cache.k.dtype) for i in (2, 3))
    slot_chunk = jnp.arange(spec.window - 1, dtype=jnp.int32)[None]
    num_chunks = jnp.full(1, spec.window - 1, jnp.int32)
    return dataclasses.replace(
        cache,
        k=k,
        v=v,
        slot_chunk=slot_chunk,
        start=slot_chunk * spec.chunk_frames,
        num_chunks=num_chunks,
    )


def prompt(spec: CallSpec) -> TextKV:
    """Random keys and values of one prompt in every layer."""
    cfg = spec.model
    shape = (cfg.layers, 1, 1, cfg.text_len, cfg.heads, cfg.head_dim)
    k, v = (jax.random.normal(jax.random.key(i), shape, cfg.dtype) for i in (4, 5))
    return TextKV(k, v)


def call_flops(spec: CallSpec) -> float:
    """FLOPs of the matrix products of one call, two per multiply-add."""
    cfg = spec.model
    queries = spec.chunk_frames * (spec.latent[0] // 2) * (spec.latent[1] // 2)
    linears = queries * (6 * cfg.dim**2 + 2 * cfg.dim * cfg.ffn_dim)
    keys = spec.window * queries + cfg.text_len
    return 2.0 * cfg.layers * (linears + 2 * queries * keys * cfg.dim)


def _plain(spec: CallSpec) -> dict[str, Any]:
    """The settings, with dtypes as their names."""
    settings = report_settings(spec)
    model = settings["model"]
    settings["model"] = {
        k: v if isinstance(v, int | float) else jnp.dtype(v).name for k, v in model.items()
    }
    return settings
