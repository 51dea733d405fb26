"""The UMT5 text encoder: T5 with a separate position table in every layer (arXiv:2304.09151).

It differs from a standard transformer in three ways: attention scores are not divided by the square
root of the head width (the initial weights are smaller instead), positions enter only as a learned
bias per head and bucketed distance, and no layer has a bias vector.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from longlive_jax.models.umt5.config import UMT5Config
from longlive_jax.typing import Array, Bool, Float, Int, typechecked


@functools.lru_cache(maxsize=8)
def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every (query, key) pair, int32 [length, length] (T5, arXiv:1910.10683, 2.1).

    With r = key - query, the second half of the buckets is for r > 0. In each direction, half of
    the buckets are exact distances; the others grow logarithmically, and the last bucket covers all
    distances from `max_distance` on.
    """
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance, half = np.abs(relative), buckets // 2
    exact = half // 2
    # float32 as in the reference: powers of two are exactly on a bucket boundary
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact)
    growth = ratio / np.float32(np.log(max_distance / exact)) * (half - exact)
    far = np.minimum(exact + growth.astype(np.int32), half - 1)
    return np.where(distance < exact, distance, far).astype(np.int32) + half * (relative > 0)


class Linear(nnx.Module):
    """Linear layer `x @ kernel` without bias; `std` is the standard deviation at initialisation."""

    def __init__(self, inputs: int, outputs: int, cfg: UMT5Config, *, std: float, rngs: nnx.Rngs):
        self.dtype = cfg.dtype
        self.kernel = nnx.Param(_normal(rngs, (inputs, outputs), std, cfg))

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        return x @ self.kernel[...].astype(self.dtype)


class Embedding(nnx.Module):
    """Embedding table of `count` rows."""

    def __init__(self, count: int, width: int, cfg: UMT5Config, *, std: float, rngs: nnx.Rngs):
        self.embedding = nnx.Param(_normal(rngs, (count, width), std, cfg))

    def __call__(self, rows: Int[Array, "*b"]) -> Float[Array, "*b e"]:
        return jnp.take(self.embedding[...], rows, axis=0)


class RMSNorm(nnx.Module):
    """RMS normalisation x / sqrt(mean(x^2) + eps) * scale, with statistics in float32."""

    def __init__(self, cfg: UMT5Config):
        self.eps, self.dtype = cfg.eps, cfg.dtype
        self.scale = nnx.Param(jnp.ones(cfg.dim, cfg.param_dtype))

    def __call__(self, x: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
        x = x.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x.astype(self.dtype) * self.scale[...].astype(self.dtype)


class Attention(nnx.Module):
    """Bidirectional self-attention with an additive bias and unscaled scores."""

    def __init__(self, cfg: UMT5Config, *, rngs: nnx.Rngs):
        self.heads = cfg.heads
        inner, head = cfg.dim_attn, cfg.dim_attn // cfg.heads
        self.q = Linear(cfg.dim, inner, cfg, std=(cfg.dim * head) ** -0.5, rngs=rngs)
        self.k = Linear(cfg.dim, inner, cfg, std=cfg.dim**-0.5, rngs=rngs)
        self.v = Linear(cfg.dim, inner, cfg, std=cfg.dim**-0.5, rngs=rngs)
        self.o = Linear(inner, cfg.dim, cfg, std=inner**-0.5, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t e"], bias: Float[Array, "n t t"], mask: Bool[Array, "b t"]
    ) -> Float[Array, "b t e"]:
        q, k, v = (m(x).reshape(*x.shape[:2], self.heads, -1) for m in (self.q, self.k, self.v))
        scores = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32) + bias
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        y = jnp.einsum("bnqk,bknd->bqnd", weights, v)
        return self.o(y.reshape(*x.shape[:2], -1))


class FeedForward(nnx.Module):
    """Gated feed-forward layer fc2(fc1(x) * GELU_tanh(gate(x)))."""

    def __init__(self, cfg: UMT5Config, *, rngs: nnx.Rngs):
        self.gate = Linear(cfg.dim, cfg.ffn_dim, cfg, std=cfg.dim**-0.5, rngs=rngs)
        self.fc1 = Linear(cfg.dim, cfg.ffn_dim, cfg, std=cfg.dim**-0.5, rngs=rngs)
        self.fc2 = Linear(cfg.ffn_dim, cfg.dim, cfg, std=cfg.ffn_dim**-0.5, rngs=rngs)

    def __call__(self, x: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
        return self.fc2(self.fc1(x) * jax.nn.gelu(self.gate(x), approximate=True))


class Block(nnx.Module):
    """Pre-norm transformer layer: attention, then feed-forward, each with a residual connection."""

    def __init__(self, cfg: UMT5Config, *, rngs: nnx.Rngs):
        std = (2 * cfg.buckets * cfg.heads) ** -0.5
        self.norm1 = RMSNorm(cfg)
        self.attn = Attention(cfg, rngs=rngs)
        self.norm2 = RMSNorm(cfg)
        self.ffn = FeedForward(cfg, rngs=rngs)
        self.pos_embedding = Embedding(cfg.buckets, cfg.heads, cfg, std=std, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t e"], buckets: Int[Array, "t t"], mask: Bool[Array, "b t"]
    ) -> Float[Array, "b t e"]:
        bias = self.pos_embedding(buckets).astype(jnp.float32).transpose(2, 0, 1)
        x = x + self.attn(self.norm1(x), bias, mask)
        return x + self.ffn(self.norm2(x))


class UMT5(nnx.Module):
    """The UMT5 encoder. The parameters of all layers are stacked along a leading axis."""

    def __init__(self, cfg: UMT5Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.token_embedding = Embedding(cfg.vocab_size, cfg.dim, cfg, std=1.0, rngs=rngs)
        keys = jax.random.split(rngs.params(), cfg.layers)
        self.blocks = jax.vmap(lambda key: Block(cfg, rngs=nnx.Rngs(params=key)))(keys)
        self.norm = RMSNorm(cfg)

    @typechecked
    def __call__(
        self, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]
    ) -> Float[Array, "b t {self.cfg.dim}"]:
        """Encodes padded token sequences.

        Args:
          ids: token ids in [0, vocab_size); ids at padding positions do not matter.
          mask: true at tokens, false at padding. Every row needs at least one token (the end mark).

        Returns:
          Features in `cfg.dtype`, zero at padding, as the reference passes them to the DiT.
        """
        cfg = self.cfg
        buckets = jnp.asarray(relative_buckets(ids.shape[1], cfg.buckets, cfg.max_distance))

        def layer(x, block):
            return block(x, buckets, mask), None

        x, _ = lax.scan(layer, self.token_embedding(ids).astype(cfg.dtype), self.blocks)
        return jnp.where(mask[..., None], self.norm(x), 0)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, cfg: UMT5Config) -> Array:
    return (std * jax.random.normal(rngs.params(), shape)).astype(cfg.param_dtype)
