"""Error of attention to NVFP4 keys and values, for every smoothing of keys.

The error is that of attention's output relative to no packing, in L2, with the cached chunks packed
and the current chunk dense. It is measured on keys with outlier channels, and on queries, keys and
values of a model in the middle of a video, over all its layers. `reference` has an error even
without packing, because it shifts the current chunk's keys.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, cast, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.bench.timing import machine
from longlive_jax.models.wan import TextKV
from longlive_jax.models.wan.cache import KVCache
from longlive_jax.models.wan.layer_kv import (
    KV,
    AttentionContext,
    DenseLayerKV,
    PackedLayerKV,
    without_mean,
)
from longlive_jax.models.wan.packed_cache import KVFormat, Smoothing, pack_keys, pack_values
from longlive_jax.sampling.drivers import ChunkInputs
from longlive_jax.sampling.engine import Engine
from longlive_jax.sampling.script import Shot, ShotScript
from longlive_jax.spec import UserError
from longlive_jax.typing import Array
from pallas_kernels.attention import attention
from pallas_kernels.nvfp4 import BLOCK
from pallas_kernels.tokens import Tokens, concat, make

LEVELS = (900.0, 500.0, 100.0)
"""Noise levels of the model's calls."""
SIZES = (0.0, 3.0, 10.0, 30.0)
"""Sizes of outlier channels, in standard deviations of the others."""
SHOTS = (
    "a red circle moves left on a white background",
    "a blue square moves up on a pink background",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVSpec:
    """Size of the measurement.

    Attributes:
      checkpoint: directory of the model whose keys are packed.
      chunks: chunks of the video before the measured one, in two shots.
      tokens: tokens of a synthetic chunk.
      heads: heads of synthetic attention.
      width: channels per head of synthetic attention.
      outliers: outlier channels per head.
    """

    checkpoint: str
    chunks: int = 5
    tokens: int = 256
    heads: int = 4
    width: int = 128
    outliers: int = 4

    def __post_init__(self) -> None:
        if self.chunks < 4 or min(self.tokens, self.heads, self.outliers) < 1:
            raise UserError(
                f"chunks must be >= 4 to fill the window, got {self.chunks}; tokens, heads and "
                f"outliers must be >= 1, got {self.tokens}, {self.heads} and {self.outliers}"
            )
        if self.width % BLOCK or self.outliers > self.width:
            raise UserError(
                f"width must be a multiple of {BLOCK} and >= outliers = {self.outliers}, got "
                f"{self.width}"
            )


@flax.struct.dataclass
class Sample:
    """Inputs of one attention.

    Attributes:
      q: queries `[b, l, n, d]`.
      own: keys and values of the current chunk `[b, l, n, d]`.
      layer_kv: cached keys and values.
      context: metadata of queries and keys.
    """

    q: Array
    own: KV
    layer_kv: DenseLayerKV
    context: AttentionContext


def bench_kv(spec: KVSpec) -> dict[str, Any]:
    """Errors by smoothing and kind of keys, and bytes, ready for JSON."""
    kinds: dict[str, list[Sample]] = {
        f"outliers of {size:g}": [synthetic(spec, size)] for size in SIZES
    }
    kinds["model"] = list(model_samples(spec))
    rows = {name: _row(KVFormat("nvfp4", smoothing=name), kinds) for name in get_args(Smoothing)}
    return {"machine": machine(), "spec": dataclasses.asdict(spec), "smoothing": rows}


def synthetic(spec: KVSpec, size: float) -> Sample:
    """Standard normal queries, keys and values, with three cached chunks.

    The same few channels of every key have `size` added, with one sign per channel and head.
    """
    rng = np.random.default_rng(0)
    heads = (spec.heads, spec.width)
    bias = np.zeros(heads)
    for head in bias:
        channels = rng.choice(spec.width, spec.outliers, replace=False)
        head[channels] = size * rng.choice([-1, 1], spec.outliers)
    own, cached = (1, spec.tokens, *heads), (1, 3, spec.tokens, *heads)
    q, k, v, cached_k, cached_v = (
        jnp.asarray(rng.standard_normal(shape) + shift, jnp.float32)
        for shape, shift in ((own, 0), (own, bias), (own, 0), (cached, bias), (cached, 0))
    )
    unmasked = (make(np.zeros((n, 3), np.int32), 0, False) for n in (spec.tokens, 4 * spec.tokens))
    return Sample(q, (k, v), DenseLayerKV(cached_k, cached_v), _context(*unmasked))


def model_samples(spec: KVSpec) -> Iterator[Sample]:
    """Every layer's attention in the model's calls on the next chunk of a video, at `LEVELS`."""
    # 1. A video up to the measured chunk.
    engine = Engine.from_checkpoint(spec.checkpoint, guidance=1.0, steps=4, kv="model")
    latents, cache, inputs = _sample_video(engine, spec.chunks)
    offset, text_kv = jnp.asarray(inputs.shot_rope_offset), cast(TextKV, inputs.text)
    noise = jax.random.normal(jax.random.key(1), latents.shape)
    # 2. Calls on the next chunk, with an attention that records its arguments.
    calls: list[tuple[np.ndarray, ...]] = []

    def recorded(q, k, v, q_tokens, k_tokens):
        jax.debug.callback(lambda *x: calls.append(tuple(map(np.asarray, x))), q, k, v)
        return attention(q, k, v, q_tokens, k_tokens)

    @jax.jit
    def call(params, cache, level):
        x = (1 - level / 1000) * latents + level / 1000 * noise
        tokens = cache.upcoming(offset, noisy=True)
        times = jnp.full(latents.shape[:2], level)
        dit = engine.sampler.dit(params)
        return dit(x, times, text_kv, tokens, cache, attend=recorded)[0]

    for level in LEVELS:
        jax.block_until_ready(call(engine.params, cache, level))
    jax.effects_barrier()
    # 3. Own keys come first, then the slots.
    queries = cache.upcoming(offset, noisy=True)
    context = _context(queries, concat(queries, cache.tokens()))
    slots, tokens = cache.k.shape[2:4]
    for arrays in calls:
        q, k, v = map(jnp.asarray, arrays)
        cached = (x[:, tokens:].reshape(1, slots, tokens, *x.shape[2:]) for x in (k, v))
        yield Sample(q, (k[:, :tokens], v[:, :tokens]), DenseLayerKV(*cached), context)


def _sample_video(engine: Engine, chunks: int) -> tuple[Array, KVCache, ChunkInputs]:
    """Latents and inputs of the last of `chunks` chunks in two shots, and the cache after it."""
    first = chunks // 2
    shots = Shot(SHOTS[0], chunks=first), Shot(SHOTS[1], chunks=chunks + 1 - first)
    script = [ShotScript(shots)]
    conditioning = engine.conditioning(script, engine.size_of(script))
    timeline, (cache, _) = engine.timeline(script), engine.start(conditioning)
    offsets = timeline.shot_rope_offsets(engine.spec.shot_rope_offset)
    for i in range(chunks):
        inputs = ChunkInputs(
            text=engine.text_kv((timeline.prompts[0][i],)),
            cut=jnp.asarray(timeline.cuts[:, i]),
            shot_rope_offset=jnp.asarray(offsets[:, i]),
        )
        latents, cache = engine.step(cache, conditioning, inputs)
    return latents, cache, inputs


def _context(q_tokens: Tokens, k_tokens: Tokens) -> AttentionContext:
    """The context of keys that are already rotated."""
    unused = jnp.zeros(0), jnp.zeros(0)
    return AttentionContext(q_tokens, k_tokens, unused, unused)


def _row(form: KVFormat, kinds: dict[str, list[Sample]]) -> dict[str, Any]:
    """Errors and bytes of one format for each kind of keys."""
    results: dict[str, Any] = {}
    for kind, samples in kinds.items():
        keys, both, square = np.sum([_errors(sample, form) for sample in samples], axis=0)
        size = _bytes(samples[0].layer_kv, form)
        results[kind] = {
            "keys_error": round(float(np.sqrt(keys / square)), 5),
            "keys_and_values_error": round(float(np.sqrt(both / square)), 5),
            "bytes_per_token_and_head": round(size, 3),
            "times_less_than_bfloat16": round(4 * samples[0].q.shape[-1] / size, 3),
        }
    return results


@functools.partial(jax.jit, static_argnums=1)
def _errors(sample: Sample, form: KVFormat) -> tuple[Array, Array, Array]:
    """Squared errors of the output with packed keys, and with packed values too, and its square."""
    q, dense, context = sample.q, sample.layer_kv, sample.context
    want = dense.attend(q, sample.own, context, attention)
    packed = PackedLayerKV(pack_keys(dense.k, form), pack_values(dense.v, form), form)
    both = packed.attend(q, sample.own, context, attention)
    own_k, own_v = sample.own
    own_k = without_mean(own_k) if form.smoothing == "reference" else own_k
    k = packed.k.dequantize(jnp.float32)
    keys = DenseLayerKV(k, dense.v).attend(q, (own_k, own_v), context, attention)
    return jnp.sum((keys - want) ** 2), jnp.sum((both - want) ** 2), jnp.sum(want**2)


def _bytes(layer_kv: DenseLayerKV, form: KVFormat) -> float:
    """Bytes per token and head in this format, key and value together."""
    k, v = layer_kv.k, layer_kv.v
    pair = jax.eval_shape(lambda k, v: (pack_keys(k, form), pack_values(v, form)), k, v)
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pair))
    return total / np.prod(k.shape[:-1])
