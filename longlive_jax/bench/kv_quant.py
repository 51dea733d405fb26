"""What packing keys and values costs attention, for every smoothing of keys.

The error is that of attention's output against nothing packed, relative in L2, with the past packed
and the current chunk as it is: on keys with outlier channels, and on queries, keys and values of a
model in the middle of a video, over all its layers. `reference` errs also where nothing is packed,
because it moves the current chunk's keys.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.bench.timing import machine
from longlive_jax.models.wan.attention import AttentionContext, DenseLayerKV
from longlive_jax.models.wan.packed_cache import (
    KVFormat,
    PackedLayerKV,
    Smoothing,
    pack_keys,
    pack_values,
    without_mean,
)
from longlive_jax.sampling.drivers import ChunkInputs
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.script import Shot, ShotScript
from longlive_jax.spec import UserError
from longlive_jax.typing import Array
from pallas_kernels.attention import attention
from pallas_kernels.attention.packed_kv import dequantize_kv
from pallas_kernels.nvfp4 import BLOCK
from pallas_kernels.tokens import Tokens, concat, make

LEVELS = (900.0, 500.0, 100.0)
"""Noise levels at which the model is asked."""
SIZES = (0.0, 3.0, 10.0, 30.0)
"""Of outlier channels, in standard deviations of the others."""
SHOTS = (
    "a red circle moves left on a white background",
    "a blue square moves up on a pink background",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVSpec:
    """What is measured.

    Attributes:
      checkpoint: directory of the model whose keys are packed.
      chunks: of the video before the one measured, in two shots.
      tokens: of a synthetic chunk.
      heads, width: of synthetic attention.
      outliers: channels of a head that are outliers.
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
                f"chunks is {self.chunks}, at least 4 fill the window; tokens, heads and outliers "
                f"are {self.tokens}, {self.heads} and {self.outliers}, at least 1 each"
            )
        if self.width % BLOCK or self.outliers > self.width:
            raise UserError(
                f"width is {self.width}: it must be a multiple of {BLOCK} and hold "
                f"{self.outliers} outliers"
            )


@flax.struct.dataclass
class Sample:
    """One attention: queries, own keys and values `[b, l, n, d]`, those of the past with slots."""

    q: Array
    own: tuple[Array, Array]
    past: DenseLayerKV
    seen: AttentionContext


def bench_kv(spec: KVSpec) -> dict[str, Any]:
    """Errors by smoothing and kind of keys, and bytes, ready for JSON."""
    kinds: dict[str, list[Sample]] = {
        f"outliers of {size:g}": [synthetic(spec, size)] for size in SIZES
    }
    kinds["model"] = list(of_model(spec))
    rows = {name: _row(KVFormat("nvfp4", smoothing=name), kinds) for name in get_args(Smoothing)}
    return {"machine": machine(), "spec": dataclasses.asdict(spec), "smoothing": rows}


def synthetic(spec: KVSpec, size: float) -> Sample:
    """Standard normal queries, keys and values, three chunks in the past; the same few channels of
    every key have `size` added, with a sign a channel and head."""
    rng = np.random.default_rng(0)
    heads = (spec.heads, spec.width)
    bias = np.zeros(heads)
    for head in bias:
        channels = rng.choice(spec.width, spec.outliers, replace=False)
        head[channels] = size * rng.choice([-1, 1], spec.outliers)
    own, past = (1, spec.tokens, *heads), (1, 3, spec.tokens, *heads)
    q, k, v, past_k, past_v = (
        jnp.asarray(rng.standard_normal(shape) + shift, jnp.float32)
        for shape, shift in ((own, 0), (own, bias), (own, 0), (past, bias), (past, 0))
    )
    everything = (
        make(np.zeros((n, 3), np.int32), 0, False) for n in (spec.tokens, 4 * spec.tokens)
    )
    return Sample(q, (k, v), DenseLayerKV(past_k, past_v), _seen(*everything))


def of_model(spec: KVSpec) -> Iterator[Sample]:
    """Every layer of the model's calls on the next chunk of a video, at `LEVELS` of noise."""
    pipe = Pipeline.from_checkpoint(spec.checkpoint, guidance=1.0, steps=4, kv="model")
    first = spec.chunks // 2
    shots = Shot(SHOTS[0], chunks=first), Shot(SHOTS[1], chunks=spec.chunks + 1 - first)
    script = [ShotScript(shots)]
    setting, laid = pipe.setting(script, pipe.size_of(script)), pipe.plan(script)
    offsets, cache = laid.offsets(pipe.spec.shot_rope_offset), pipe.cache(1, pipe.size_of(script))
    for i in range(spec.chunks):
        words = pipe.words((laid.prompts[0][i],))
        offset = jnp.asarray(offsets[:, i])
        order = ChunkInputs(words, jnp.asarray(laid.cuts[:, i]), offset)
        latents, cache = pipe.sampler.step(pipe.params, cache, setting, order)
    noise = jax.random.normal(jax.random.key(1), latents.shape)
    found: list[tuple[np.ndarray, ...]] = []

    def watched(q, k, v, q_tokens, k_tokens):
        jax.debug.callback(lambda *x: found.append(tuple(map(np.asarray, x))), q, k, v)
        return attention(q, k, v, q_tokens, k_tokens)

    @jax.jit
    def call(params, cache, level):
        x = (1 - level / 1000) * latents + level / 1000 * noise
        tokens = cache.upcoming(offset, noisy=True)
        times = jnp.full(latents.shape[:2], level)
        return pipe.sampler.dit(params)(x, times, words, tokens, cache, attend=watched)[0]

    for level in LEVELS:
        jax.block_until_ready(call(pipe.params, cache, level))
    jax.effects_barrier()
    queries = cache.upcoming(offset, noisy=True)
    seen = _seen(queries, concat(queries, cache.tokens()))
    slots, tokens = cache.k.shape[2:4]
    for arrays in found:
        q, k, v = map(jnp.asarray, arrays)
        past = (x[:, tokens:].reshape(1, slots, tokens, *x.shape[2:]) for x in (k, v))
        yield Sample(q, (k[:, :tokens], v[:, :tokens]), DenseLayerKV(*past), seen)


def _seen(q_tokens: Tokens, k_tokens: Tokens) -> AttentionContext:
    """For keys that are rotated already."""
    nothing = jnp.zeros(0), jnp.zeros(0)
    return AttentionContext(q_tokens, k_tokens, nothing, nothing)


def _row(form: KVFormat, kinds: dict[str, list[Sample]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, samples in kinds.items():
        keys, both, whole = np.sum([_errors(sample, form) for sample in samples], axis=0)
        size = _bytes(samples[0].past, form)
        found[kind] = {
            "keys_error": round(float(np.sqrt(keys / whole)), 5),
            "keys_and_values_error": round(float(np.sqrt(both / whole)), 5),
            "bytes_per_token_and_head": round(size, 3),
            "times_less_than_bfloat16": round(4 * samples[0].q.shape[-1] / size, 3),
        }
    return found


@functools.partial(jax.jit, static_argnums=1)
def _errors(sample: Sample, form: KVFormat) -> tuple[Array, Array, Array]:
    """Squared errors of the output with keys packed, and values too, and the output's square."""
    q, past, seen = sample.q, sample.past, sample.seen
    want = past.attend(q, sample.own, seen, attention)
    packed = PackedLayerKV(pack_keys(past.k, form), pack_values(past.v, form), form)
    both = packed.attend(q, sample.own, seen, attention)
    k = dequantize_kv(packed.k.array, packed.k.offset, jnp.float32).reshape(past.k.shape)
    own_k, own_v = sample.own
    own_k = without_mean(own_k) if form.smoothing == "reference" else own_k
    keys = DenseLayerKV(k, past.v).attend(q, (own_k, own_v), seen, attention)
    return jnp.sum((keys - want) ** 2), jnp.sum((both - want) ** 2), jnp.sum(want**2)


def _bytes(past: DenseLayerKV, form: KVFormat) -> float:
    """Of a token and head: key and value."""
    pair = jax.eval_shape(lambda k, v: (pack_keys(k, form), pack_values(v, form)), past.k, past.v)
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pair))
    return total / np.prod(past.k.shape[:-1])
