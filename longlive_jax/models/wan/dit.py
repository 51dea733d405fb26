"""The diffusion transformer of Wan 2.2 (paper, section 3; Wan 2.2 report).

One model for bidirectional, block-causal, teacher-forced and cached use: only `tokens` and `cache`
differ. Layers are stacked and scanned; each may hand back its keys and values, and what becomes of
them is the caller's business.
"""

from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from longlive_jax.models.wan.attention import (
    KV,
    AttentionContext,
    Cache,
    CrossAttention,
    LayerKV,
    SelfAttention,
    TextKV,
    TextRows,
)
from longlive_jax.models.wan.config import DiTConfig
from longlive_jax.models.wan.layers import (
    FeedForward,
    LayerNorm,
    Linear,
    TextEmbedding,
    TimeEmbedding,
    modulate,
    round_like_reference,
    time_dtype,
)
from longlive_jax.models.wan.positions import rope_rotation
from longlive_jax.typing import Array, Float, typechecked
from pallas_kernels.attention import AttentionFn, attention
from pallas_kernels.tokens import Tokens, concat

__all__ = ["GATES", "DiT", "DiTBlock", "TextKV", "TextRows"]

Materialize = Callable[..., Any]
"""`(module, *path) -> module` ready for use, for a layer or a part of one at `path`: what gathers
parameters that are shared out, or unpacks quantized ones, wraps the model here."""


def identity[M: nnx.Module](module: M, *_path: str) -> M:
    """The module itself."""
    return module


def keep_kv(k: Array, v: Array) -> KV:
    """Keys and values as they are."""
    return k, v


GATES = (2, 5)
"""Rows of a block's modulation table that gate its attention and its feed-forward part."""


class DiTBlock(nnx.Module):
    """Self-attention, text, feed-forward; the noise level steers the first and the last."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        table = jax.random.normal(rngs.params(), (6, cfg.dim), cfg.param_dtype) * cfg.dim**-0.5
        self.modulation = nnx.Param(table)
        self.self_attn = SelfAttention(cfg, rngs=rngs)
        self.cross_attn = CrossAttention(cfg, rngs=rngs)
        self.norm3 = LayerNorm(cfg)
        self.ffn = FeedForward(cfg, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b g p e"],
        mod: Float[Array, "b g 6 e"],
        text: KV,
        seen: AttentionContext,
        past: LayerKV | None,
        *,
        streams: int,
        attend: AttentionFn,
        attend_text: AttentionFn = attention,
        ffn_chunks: int = 1,
    ) -> tuple[Float[Array, "b g p e"], KV]:
        """`x` is grouped so that the `p` tokens of a group share their noise level."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self._slots(mod)
        y, kv = self.self_attn(
            _flat(modulate(x, shift1, scale1, self.cfg)), seen, past, attend=attend
        )
        x = self._add(x, y, gate1)
        words = self.cross_attn(_flat(self.norm3(x)), text, streams=streams, attend=attend_text)
        x = self._add(x, words)
        y = _in_parts(self.ffn, _flat(modulate(x, shift2, scale2, self.cfg)), ffn_chunks)
        return self._add(x, y, gate2), kv

    def compute_kv(self, x: Float[Array, "b g p e"], mod: Array, seen: AttentionContext) -> KV:
        """Only the keys and values that `__call__` would give."""
        shift, scale, *_ = self._slots(mod)
        return self.self_attn.compute_kv(_flat(modulate(x, shift, scale, self.cfg)), seen)

    def _slots(self, mod: Array) -> tuple[Array, ...]:
        """Six [b, g, 1, e]: shift, scale, gate of attention, then of the feed-forward."""
        slots = round_like_reference(self.modulation[...].astype(jnp.float32) + mod, self.cfg)
        return tuple(slots[:, :, i : i + 1] for i in range(6))

    def _add(self, x: Array, y: Array, gate: Array | None = None) -> Array:
        y = y.astype(jnp.float32).reshape(x.shape)
        return round_like_reference(
            x + (y if gate is None else round_like_reference(gate * y, self.cfg)), self.cfg
        )


class Head(nnx.Module):
    """Modulated norm and the linear to patch values; zero at initialisation."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        table = jax.random.normal(rngs.params(), (2, cfg.dim), cfg.param_dtype) * cfg.dim**-0.5
        self.modulation = nnx.Param(table)
        zeros = nnx.initializers.zeros_init()
        self.linear = Linear(cfg.dim, 4 * cfg.out_channels, cfg, rngs=rngs, kernel_init=zeros)

    def __call__(self, x: Float[Array, "b g p e"], time: Float[Array, "b g e"]) -> Array:
        mod = round_like_reference(
            self.modulation[...].astype(jnp.float32) + time[:, :, None], self.cfg
        )
        return self.linear(modulate(x, mod[:, :, :1], mod[:, :, 1:], self.cfg))


class DiT(nnx.Module):
    """Velocity model over latents of any length and size."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.patch_embedding = Linear(4 * cfg.in_channels, cfg.dim, cfg, rngs=rngs)
        self.text_embedding = TextEmbedding(cfg, rngs=rngs)
        self.time_embedding = TimeEmbedding(cfg, rngs=rngs)
        self.time_projection = Linear(cfg.dim, 6 * cfg.dim, cfg, rngs=rngs, dtype=time_dtype(cfg))
        keys = jax.random.split(rngs.params(), cfg.layers)
        self.blocks = jax.vmap(lambda key: DiTBlock(cfg, rngs=nnx.Rngs(key)))(keys)
        self.head = Head(cfg, rngs=rngs)

    @typechecked
    def text_kv(
        self,
        text: Float[Array, "b s t e"],
        *,
        streams: int = 1,
        materialize: Materialize = identity,
    ) -> TextKV:
        """Keys and values of `s` prompts a sample, given as text encoder rows with zeroed padding.

        Rows are zero-padded to `cfg.text_len`, and padding is attended like text: the weights were
        trained so. Raises ValueError for longer prompts.
        """
        rows = self.text_rows(text, streams=streams).rows

        def layer(_, attn):
            return None, materialize(attn, "blocks", "cross_attn").keys_values(rows)

        _, (k, v) = lax.scan(layer, None, self.blocks.cross_attn)
        return TextKV(k, v, streams=streams)

    @typechecked
    def text_rows(self, text: Float[Array, "b s t e"], *, streams: int = 1) -> TextRows:
        """The same prompts padded and embedded, which is what the layers share."""
        length = text.shape[2]
        if length > self.cfg.text_len:
            raise ValueError(f"{length} text rows; this model takes at most {self.cfg.text_len}")
        text = jnp.pad(text, ((0, 0), (0, 0), (0, self.cfg.text_len - length), (0, 0)))
        return TextRows(self.text_embedding(text), streams=streams)

    @typechecked
    def __call__(
        self,
        latents: Float[Array, "b f h w c"],
        timestep: Float[Array, "b g"],
        text: TextKV | TextRows,
        tokens: Tokens,
        cache: Cache | None = None,
        *,
        attend: AttentionFn = attention,
        attend_text: AttentionFn = attention,
        noisy_from: int = 0,
        output: bool = True,
        return_kv: bool = False,
        store: Callable[[Array, Array], Any] = keep_kv,
        relative_rope: bool = False,
        remat: bool = False,
        unroll: int = 1,
        ffn_chunks: int = 1,
        materialize: Materialize = identity,
    ) -> tuple[Float[Array, "b f2 h w c2"] | None, Any]:
        """Velocity (noise - x0) of `latents`, and the keys and values of every layer.

        `timestep` in [0, 1000] has one entry a frame or one a token (frame, row, column order).
        `tokens` describe the latents' 2x2 patches. Teacher forcing concatenates clean and noisy
        frames and sets `noisy_from`: the head then runs from that frame on, and the velocity has
        only those frames. With a `cache` its keys follow the latents' own. `relative_rope`: the
        cache holds keys that are not rotated; `cache.tokens` says at which positions to see them.
        `ffn_chunks` of the sequence pass the feed-forward one after the other, rematerialised.

        Returns `(velocity, (k, v))`: velocity in float32; k and v `[layers, b, l, n, d]` in
        `cfg.dtype` if `return_kv`, else None. `output=False` only fills a cache: no velocity, but
        k and v. `store` converts a layer's k and v `[b, l, n, d]` before all layers are stacked.
        """
        x = self._embed(latents, timestep, tokens, text)
        time, mod = self._levels(timestep)
        seen = _seen(tokens, cache, self.cfg, relative_rope)
        options = {"attend": attend, "attend_text": attend_text, "ffn_chunks": ffn_chunks}
        kept = store if return_kv or not output else None
        layer = _layer(text, mod, seen, kept, materialize, options)
        if not output:
            layers = self._layers(text, cache)
            return None, self._fill(layer, x, layers, mod, seen, materialize, store)
        body = jax.checkpoint(layer, prevent_cse=False) if remat else layer
        x, kv = lax.scan(body, x, self._layers(text, cache), unroll=unroll)
        return self._velocity(x.astype(jnp.float32), time, latents.shape, noisy_from), kv

    def _layers(self, text: TextKV | TextRows, cache: Cache | None):
        """What is scanned over: modules, their texts' keys and values, and their past."""
        words = (text.k, text.v) if isinstance(text, TextKV) else None
        return self.blocks, words, None if cache is None else cache.past

    def _velocity(self, x: Array, time: Array, shape: tuple[int, ...], noisy_from: int) -> Array:
        first = noisy_from * x.shape[1] // shape[1]
        return self._unpatchify(self.head(x[:, first:], time[:, first:]), shape, noisy_from)

    def _fill(
        self,
        layer,
        x: Array,
        layers,
        mod: Array,
        seen: AttentionContext,
        materialize: Materialize,
        store,
    ) -> Any:
        """Keys and values of all layers; of the last layer nothing else is computed."""

        def at(i):
            return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), layers)

        last = self.cfg.layers - 1
        x, kv = lax.scan(lambda x, i: layer(x, at(i)), x, jnp.arange(last))
        block, _, _ = at(last)
        final = store(*materialize(block, "blocks").compute_kv(x.astype(jnp.float32), mod, seen))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), kv, final)

    def _levels(self, timestep: Array) -> tuple[Array, Array]:
        """Embedding [b, g, e] and block modulation [b, g, 6, e] of noise levels, in float32."""
        time = self.time_embedding(timestep).astype(jnp.float32)
        mod = self.time_projection(jax.nn.silu(time).astype(time_dtype(self.cfg)))
        return time, einops.rearrange(mod.astype(jnp.float32), "b g (six e) -> b g six e", six=6)

    def _embed(self, latents: Array, timestep: Array, tokens: Tokens, text: TextKV | TextRows):
        """Patches as [b, groups, tokens a group, e], one group a timestep."""
        b, frames, height, width, channels = latents.shape
        if channels != self.cfg.in_channels or height % 2 or width % 2:
            raise ValueError(
                f"latents {latents.shape} for a model of {self.cfg.in_channels} channels; "
                "height and width must be even"
            )
        length = frames * height * width // 4
        groups = timestep.shape[1]
        if groups not in (frames, length):
            raise ValueError(f"{groups} timesteps for {frames} frames of {length} tokens in all")
        if len(tokens) != length:
            raise ValueError(f"{len(tokens)} tokens described, {length} given")
        parts = text.streams * text.segments
        if frames % parts:
            raise ValueError(f"{frames} frames do not split into {parts} segments of text")
        pattern = "b f (h ph) (w pw) c -> b (f h w) (ph pw c)"
        x = self.patch_embedding(einops.rearrange(latents, pattern, ph=2, pw=2))
        x = round_like_reference(x, self.cfg).astype(self.cfg.stream_dtype)
        return x.reshape(b, groups, length // groups, -1)

    def _unpatchify(self, x: Array, shape: tuple[int, ...], first: int) -> Array:
        b, frames, height, width, _ = shape
        x = x.astype(jnp.float32).reshape(b, frames - first, height // 2, width // 2, -1)
        return einops.rearrange(x, "b f h w (ph pw c) -> b f (h ph) (w pw) c", ph=2, pw=2)


def _layer(
    text: TextKV | TextRows,
    mod: Array,
    seen: AttentionContext,
    store,
    materialize: Materialize,
    options: Any,
):
    """A step of the scan over layers; `store` is None where keys and values are not kept. A layer
    without keys of the texts makes its own, within what remat computes again."""
    rows = text.rows if isinstance(text, TextRows) else None

    def layer(x, xs):
        block, words, past = xs
        block = materialize(block, "blocks")
        words = block.cross_attn.keys_values(rows) if words is None else words
        y, kv = block(
            x.astype(jnp.float32), mod, words, seen, past, streams=text.streams, **options
        )
        return y.astype(x.dtype), None if store is None else store(*kv)

    return layer


def _seen(tokens: Tokens, cache: Cache | None, cfg: DiTConfig, relative: bool) -> AttentionContext:
    keys = tokens if cache is None else concat(tokens, cache.tokens(tokens))
    rotation = rope_rotation(tokens.pos, cfg.head_dim)
    rotate_keys = rope_rotation(keys.pos, cfg.head_dim) if relative else rotation
    return AttentionContext(tokens, keys, rotation, rotate_keys, relative=relative)


def _in_parts(function: Callable[[Array], Array], x: Float[Array, "b l e"], parts: int) -> Array:
    """`function` of the tokens of `x`, part after part; ValueError if they do not split."""
    if parts == 1:
        return function(x)
    b, length, width = x.shape
    if length % parts:
        raise ValueError(f"{length} tokens do not split into ffn_parts = {parts}; choose a divisor")
    split = jnp.swapaxes(x.reshape(b, parts, -1, width), 0, 1)
    out = lax.map(jax.checkpoint(function, prevent_cse=False), split)
    return jnp.swapaxes(out, 0, 1).reshape(b, length, width)


def _flat(x: Float[Array, "b g p e"]) -> Float[Array, "b l e"]:
    return x.reshape(x.shape[0], -1, x.shape[-1])
