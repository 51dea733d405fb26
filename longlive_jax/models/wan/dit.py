"""The diffusion transformer of Wan 2.2 (paper, section 3; Wan 2.2 report).

One model for bidirectional, block-causal, teacher-forced and cached use: only `tokens` and `cache`
differ. Layers are stacked and scanned. Each can return its keys and values; writing them to a cache
is up to the caller.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from longlive_jax.models.per_layer import scan_layers, take_layer, update_layers
from longlive_jax.models.wan.attention import (
    Cache,
    CrossAttention,
    EmbeddedText,
    SelfAttention,
    TextKV,
)
from longlive_jax.models.wan.config import DiTConfig
from longlive_jax.models.wan.layer_kv import KV, AttentionContext, LayerKV
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
from longlive_jax.models.wan.remat import Remat, checkpointed
from longlive_jax.typing import Array, Float, typechecked
from pallas_kernels.attention import AttentionFn, attention
from pallas_kernels.tokens import Tokens, concat

__all__ = ["GATES", "DiT", "DiTBlock", "EmbeddedText", "TextKV"]

Materialize = Callable[..., Any]
"""`(module, *path) -> module` with usable parameters, called on a layer or a submodule of one at
`path`: the hook where sharded parameters are gathered and quantized ones are dequantized."""


def identity[M: nnx.Module](module: M, *_path: str) -> M:
    """The module itself."""
    return module


WriteLayer = Callable[[LayerKV, Any, Array, Array], LayerKV]
"""`(stored, layer, k, v) -> stored` with that layer's keys and values written to it."""


def keep_kv(k: Array, v: Array) -> KV:
    """The default `store`: keys and values unchanged."""
    return k, v


GATES = (2, 5)
"""Rows of a block's modulation table that gate its attention and its feed-forward layer."""


class DiTBlock(nnx.Module):
    """Self-attention, cross-attention to text, feed-forward; noise levels modulate 1 and 3."""

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
        modulation: Float[Array, "b g 6 e"],
        text_kv: KV,
        context: AttentionContext,
        layer_kv: LayerKV | None,
        *,
        streams: int,
        attend: AttentionFn,
        attend_text: AttentionFn = attention,
        ffn_chunks: int = 1,
    ) -> tuple[Float[Array, "b g p e"], KV]:
        """Output of the layer, and its own keys and values `[b, l, n, d]`.

        The `p` tokens of a group of `x` have one noise level, so `l` = g * p.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self._modulation(modulation)
        # 1. Self-attention
        y = _flatten(modulate(x, shift1, scale1, self.cfg))
        y, kv = self.self_attn(y, context, layer_kv, attend=attend)
        x = self._add(x, y, gate1)
        # 2. Cross-attention
        y = _flatten(self.norm3(x))
        x = self._add(x, self.cross_attn(y, text_kv, streams=streams, attend=attend_text))
        # 3. Feed-forward
        y = _map_splits(self.ffn, _flatten(modulate(x, shift2, scale2, self.cfg)), ffn_chunks)
        return self._add(x, y, gate2), kv

    def compute_kv(
        self, x: Float[Array, "b g p e"], modulation: Array, context: AttentionContext
    ) -> KV:
        """The keys and values of `__call__`, and nothing else of it."""
        shift, scale, *_ = self._modulation(modulation)
        return self.self_attn.compute_kv(_flatten(modulate(x, shift, scale, self.cfg)), context)

    def _modulation(self, modulation: Array) -> tuple[Array, ...]:
        """Six [b, g, 1, e]: shift, scale, gate of self-attention, then of the feed-forward."""
        table = self.modulation[...].astype(jnp.float32)
        rows = round_like_reference(table + modulation, self.cfg)
        return tuple(rows[:, :, i : i + 1] for i in range(6))

    def _add(self, x: Array, y: Array, gate: Array | None = None) -> Array:
        y = y.astype(jnp.float32).reshape(x.shape)
        return round_like_reference(
            x + (y if gate is None else round_like_reference(gate * y, self.cfg)), self.cfg
        )


class Head(nnx.Module):
    """Modulated norm and the projection to patch values; zero at initialisation."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        table = jax.random.normal(rngs.params(), (2, cfg.dim), cfg.param_dtype) * cfg.dim**-0.5
        self.modulation = nnx.Param(table)
        zeros = nnx.initializers.zeros_init()
        self.linear = Linear(cfg.dim, 4 * cfg.out_channels, cfg, rngs=rngs, kernel_init=zeros)

    def __call__(self, x: Float[Array, "b g p e"], time: Float[Array, "b g e"]) -> Array:
        table = self.modulation[...].astype(jnp.float32)
        rows = round_like_reference(table + time[:, :, None], self.cfg)
        return self.linear(modulate(x, rows[:, :, :1], rows[:, :, 1:], self.cfg))


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
        text_features: Float[Array, "b s t e"],
        *,
        streams: int = 1,
        materialize: Materialize = identity,
    ) -> TextKV:
        """Keys and values of `s` prompts per sample in every layer.

        `text_features` are the text encoder's output with zeros beyond each prompt. They are
        zero-padded to `cfg.text_len`, and padding is attended like text, as the weights were
        trained. Raises ValueError for longer prompts.
        """
        features = self.embed_text(text_features, streams=streams).features

        def layer(_, attn):
            return None, materialize(attn, "blocks", "cross_attn").keys_values(features)

        _, (k, v) = scan_layers(layer, None, self.blocks.cross_attn)
        return TextKV(k, v, streams=streams)

    @typechecked
    def embed_text(
        self, text_features: Float[Array, "b s t e"], *, streams: int = 1
    ) -> EmbeddedText:
        """Prompts as in `text_kv`, padded and embedded: the input of every layer's keys."""
        length = text_features.shape[2]
        if length > self.cfg.text_len:
            raise ValueError(f"text tokens must be <= {self.cfg.text_len}, got {length}")
        padding = ((0, 0), (0, 0), (0, self.cfg.text_len - length), (0, 0))
        padded = jnp.pad(text_features, padding)
        return EmbeddedText(self.text_embedding(padded), streams=streams)

    @typechecked
    def __call__(
        self,
        latents: Float[Array, "b f h w c"],
        timestep: Float[Array, "b g"],
        text: TextKV | EmbeddedText,
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
        remat: Remat = "none",
        unroll: int = 1,
        ffn_chunks: int = 1,
        materialize: Materialize = identity,
    ) -> tuple[Float[Array, "b f2 h w c2"] | None, Any]:
        """Velocity (noise - x0) in float32, and keys and values `[layers, b, l, n, d]`.

        Args:
          timestep: noise levels in [0, 1000], one per frame or one per token (frame, row, column).
          tokens: metadata of the latents' 2x2 patches.
          cache: past chunks, whose keys follow the latents' own.
          noisy_from: first frame of the velocity; teacher forcing puts clean frames before it.
          output: False computes no velocity (None), only keys and values for a cache.
          return_kv: whether keys and values are returned; None otherwise.
          store: converts a layer's k and v (in `cfg.dtype`) before the layers are stacked.
          relative_rope: whether the cache stores unrotated keys, positioned by `cache.tokens`.
          remat: what the gradient recomputes of a layer.
          ffn_chunks: sequence chunks of the feed-forward, run one by one and rematerialised.
        """
        x = self._embed(latents, timestep, tokens, text)
        time, modulation = self._time(timestep)
        context = attention_context(tokens, cache, self.cfg, relative_rope)
        options = {"attend": attend, "attend_text": attend_text, "ffn_chunks": ffn_chunks}
        kv_store = store if return_kv or not output else None
        layer = LayerScan(text, modulation, context, kv_store, materialize, options)
        layers = self._scan_inputs(text, cache)
        if not output:
            return None, self._context_pass(layer, x, layers)
        x, kv = scan_layers(checkpointed(layer.step, remat), x, layers, unroll=unroll)
        return self._velocity(x.astype(jnp.float32), time, latents.shape, noisy_from), kv

    def _scan_inputs(self, text: TextKV | EmbeddedText, cache: Cache | None):
        """What is scanned over: modules, the prompts' keys and values, and the cache."""
        text_kv = (text.k, text.v) if isinstance(text, TextKV) else None
        return self.blocks, text_kv, None if cache is None else cache.layer_kv

    def _velocity(self, x: Array, time: Array, shape: tuple[int, ...], noisy_from: int) -> Array:
        first = noisy_from * x.shape[1] // shape[1]
        return self._unpatchify(self.head(x[:, first:], time[:, first:]), shape, noisy_from)

    def _context_pass(self, layer: "LayerScan", x: Array, layers) -> Any:
        """Keys and values of all layers; only those are computed of the last layer."""
        last = self.cfg.layers - 1
        x, kv = lax.scan(lambda x, i: layer.step(x, take_layer(layers, i)), x, jnp.arange(last))
        final = layer.kv(x, take_layer(layers, last))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), kv, final)

    def write_kv(
        self,
        latents: Float[Array, "b f h w c"],
        timestep: Float[Array, "b g"],
        text: TextKV,
        tokens: Tokens,
        cache: Cache,
        write: WriteLayer,
        *,
        attend: AttentionFn = attention,
        attend_text: AttentionFn = attention,
        relative_rope: bool = False,
        materialize: Materialize = identity,
    ) -> LayerKV:
        """`cache.layer_kv` with the keys and values of `latents`, which `write` stores by layer.

        Every layer attends its cache as it was before. Of the last layer only keys and values are
        computed. The other arguments are those of `__call__`.
        """
        x = self._embed(latents, timestep, tokens, text)
        modulation = self._time(timestep)[1]
        context = attention_context(tokens, cache, self.cfg, relative_rope)
        options = {"attend": attend, "attend_text": attend_text}
        layer = LayerScan(text, modulation, context, keep_kv, materialize, options)
        inputs, last = (self.blocks, (text.k, text.v)), self.cfg.layers - 1
        x, stored = update_layers(layer.step, write, x, inputs, cache.layer_kv, layers=last)
        return write(stored, last, *layer.kv(x, (*take_layer(inputs, last), None)))

    def _time(self, timestep: Array) -> tuple[Array, Array]:
        """Time embedding [b, g, e] and block modulation [b, g, 6, e], both in float32."""
        time = self.time_embedding(timestep).astype(jnp.float32)
        rows = self.time_projection(jax.nn.silu(time).astype(time_dtype(self.cfg)))
        return time, einops.rearrange(rows.astype(jnp.float32), "b g (six e) -> b g six e", six=6)

    def _embed(self, latents: Array, timestep: Array, tokens: Tokens, text: TextKV | EmbeddedText):
        """Patches as [b, groups, tokens per group, e], one group per timestep."""
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
            raise ValueError(f"tokens describe {len(tokens)} patches, latents have {length}")
        segments = text.streams * text.segments
        if frames % segments:
            raise ValueError(f"{frames} frames do not split into {segments} segments of text")
        pattern = "b f (h ph) (w pw) c -> b (f h w) (ph pw c)"
        x = self.patch_embedding(einops.rearrange(latents, pattern, ph=2, pw=2))
        x = round_like_reference(x, self.cfg).astype(self.cfg.stream_dtype)
        return x.reshape(b, groups, length // groups, -1)

    def _unpatchify(self, x: Array, shape: tuple[int, ...], first: int) -> Array:
        b, frames, height, width, _ = shape
        x = x.astype(jnp.float32).reshape(b, frames - first, height // 2, width // 2, -1)
        return einops.rearrange(x, "b f h w (ph pw c) -> b f (h ph) (w pw) c", ph=2, pw=2)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerScan:
    """The body of the scan over layers, and what is the same in all of them.

    Attributes:
      text: the prompts. With `EmbeddedText` a layer computes their keys and values, inside remat.
      modulation: noise levels as block modulation.
      context: metadata and rotations of self-attention.
      store: converts the keys and values that a layer returns; None returns none.
      materialize: makes a layer's parameters usable.
      options: keyword arguments of `DiTBlock`.
    """

    text: TextKV | EmbeddedText
    modulation: Array
    context: AttentionContext
    store: Callable[[Array, Array], Any] | None
    materialize: Materialize
    options: dict[str, Any]

    def step(self, x: Array, xs) -> tuple[Array, Any]:
        """One layer: its output, and its stored keys and values."""
        block, text_kv, layer_kv = xs
        block = self.materialize(block, "blocks")
        if isinstance(self.text, EmbeddedText):
            text_kv = block.cross_attn.keys_values(self.text.features)
        y, kv = block(
            x.astype(jnp.float32), self.modulation, text_kv, self.context, layer_kv,
            streams=self.text.streams, **self.options,
        )  # fmt: skip
        return y.astype(x.dtype), None if self.store is None else self.store(*kv)

    def kv(self, x: Array, xs) -> Any:
        """The stored keys and values of one layer, and nothing else of it."""
        block, _, _ = xs
        block = self.materialize(block, "blocks")
        kv = block.compute_kv(x.astype(jnp.float32), self.modulation, self.context)
        assert self.store is not None
        return self.store(*kv)


def attention_context(
    tokens: Tokens, cache: Cache | None, cfg: DiTConfig, relative: bool
) -> AttentionContext:
    """Metadata and rotations for queries at `tokens`, and keys at `tokens` and in the cache."""
    keys = tokens
    if cache is not None:
        cached = cache.tokens(tokens)
        leading = tokens.uniform_mask and cached.leading  # own keys are all visible, and come first
        keys = dataclasses.replace(concat(tokens, cached), leading=leading)
    q_rotation = rope_rotation(tokens.pos, cfg.head_dim)
    k_rotation = rope_rotation(keys.pos, cfg.head_dim) if relative else q_rotation
    return AttentionContext(tokens, keys, q_rotation, k_rotation, relative=relative)


def _map_splits(function: Callable[[Array], Array], x: Float[Array, "b l e"], splits: int) -> Array:
    """Applies `function` to `splits` equal slices of the sequence, one by one.

    Raises ValueError if the sequence does not split evenly.
    """
    if splits == 1:
        return function(x)
    b, length, width = x.shape
    if length % splits:
        raise ValueError(f"{length} tokens do not split into ffn_chunks = {splits}; use a divisor")
    slices = jnp.swapaxes(x.reshape(b, splits, -1, width), 0, 1)
    out = lax.map(jax.checkpoint(function, prevent_cse=False), slices)
    return jnp.swapaxes(out, 0, 1).reshape(b, length, width)


def _flatten(x: Float[Array, "b g p e"]) -> Float[Array, "b l e"]:
    return x.reshape(x.shape[0], -1, x.shape[-1])
