"""Linear layers, norms, the feed-forward and the embeddings of the DiT.

All arithmetic is float32 except matrix products, which use `cfg.dtype`. Under `cfg.reference_bf16`
intermediate results are rounded where the reference stores bfloat16. The rounding is
`lax.reduce_precision`, because XLA removes a cast to bfloat16 and back.
"""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from longlive_jax.models.wan.config import DiTConfig
from longlive_jax.models.wan.positions import BASE, angles
from longlive_jax.typing import Array, Float, Float32

gelu = partial(jax.nn.gelu, approximate=True)
xavier = nnx.initializers.xavier_uniform()
small_normal = nnx.initializers.normal(0.02)


def round_like_reference(x: Array, cfg: DiTConfig) -> Float32[Array, "..."]:
    """`x` in float32, rounded to bfloat16 under `cfg.reference_bf16`."""
    x = x.astype(jnp.float32)
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) if cfg.reference_bf16 else x


@jax.custom_vjp
def affine(
    x: Float[Array, "... i"], kernel: Float[Array, "i o"], bias: Float[Array, "o"]
) -> Float[Array, "... o"]:
    """`x @ kernel + bias` in the dtype of `x`; parameter gradients accumulate in float32.

    The derivative is written out for three reasons: the one JAX derives transposes an operand, for
    which CPUs have no 16-bit routine (50 times slower), sums the bias gradient in small windows,
    which is slow, and rounds the gradients of float32 parameters.
    """
    return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


def _affine_forward(x, kernel, bias):
    return affine(x, kernel, bias), (x, kernel, bias)


def _affine_backward(residuals, grad):
    x, kernel, bias = residuals
    leading = tuple(range(x.ndim - 1))
    contract = partial(lax.dot_general, preferred_element_type=jnp.float32)
    to_kernel = contract(x, grad, ((leading, leading), ((), ())))
    ones = jnp.ones(x.shape[:-1], grad.dtype)
    to_bias = contract(ones, grad, ((leading, leading), ((), ())))
    to_x = jnp.einsum("...o,io->...i", grad, kernel.astype(grad.dtype))
    return to_x, to_kernel.astype(kernel.dtype), to_bias.astype(bias.dtype)


affine.defvjp(_affine_forward, _affine_backward)


@runtime_checkable
class Product(Protocol):
    """A kernel that computes its own product: a quantized one, or one with a low-rank branch.

    It is a pytree that replaces the plain array among the parameters; the leaves of stacked layers
    have a leading axis of layers.
    """

    def product(self, x: Float[Array, "... i"], bias: Float[Array, "o"], /) -> Array:
        """`x @ kernel + bias`, `[..., o]` in the dtype of `x`."""


class Linear(nnx.Module):
    """`x @ kernel + bias` in `dtype` (default `cfg.dtype`); Xavier-uniform kernel by default."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        cfg: DiTConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        kernel_init=xavier,
    ):
        self.dtype = cfg.dtype if dtype is None else dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), (inputs, outputs), cfg.param_dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, cfg.param_dtype))

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        x, kernel = x.astype(self.dtype), self.kernel.get_value()
        if isinstance(kernel, Product):
            return kernel.product(x, self.bias[...])
        return affine(x, kernel, self.bias[...])


def normalise(x: Float[Array, "... e"], eps: float) -> Float32[Array, "... e"]:
    """LayerNorm without parameters, in float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)


def modulate(x: Array, shift: Array, scale: Array, cfg: DiTConfig) -> Array:
    """LayerNorm(x) * (1 + scale) + shift, cast to `cfg.dtype` for the following product."""
    y = round_like_reference(normalise(x, cfg.eps), cfg)
    y = round_like_reference(y * round_like_reference(1 + scale, cfg), cfg)
    return (y + shift).astype(cfg.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm with scale and bias, computed in float32, returned in `cfg.dtype`."""

    def __init__(self, cfg: DiTConfig):
        self.cfg = cfg
        self.scale = nnx.Param(jnp.ones(cfg.dim, cfg.param_dtype))
        self.bias = nnx.Param(jnp.zeros(cfg.dim, cfg.param_dtype))

    def __call__(self, x: Float[Array, "... e"]) -> Float[Array, "... e"]:
        y = normalise(x, self.cfg.eps) * self.scale[...].astype(jnp.float32)
        return (y + self.bias[...].astype(jnp.float32)).astype(self.cfg.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the full width, before heads are split; computed in float32."""

    def __init__(self, cfg: DiTConfig):
        self.cfg = cfg
        self.scale = nnx.Param(jnp.ones(cfg.dim, cfg.param_dtype))

    def __call__(self, x: Float[Array, "... e"]) -> Float[Array, "... e"]:
        y = x.astype(jnp.float32)
        y = round_like_reference(
            y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.cfg.eps), self.cfg
        )
        return (y * self.scale[...].astype(jnp.float32)).astype(self.cfg.dtype)


class FeedForward(nnx.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.up = Linear(cfg.dim, cfg.ffn_dim, cfg, rngs=rngs)
        self.down = Linear(cfg.ffn_dim, cfg.dim, cfg, rngs=rngs)

    def __call__(self, x: Float[Array, "b l e"]) -> Float[Array, "b l e"]:
        return self.down(gelu(self.up(x)))


class TextEmbedding(nnx.Module):
    """Projects the text encoder's output to the model's width."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        init: dict[str, Any] = {"rngs": rngs, "kernel_init": small_normal}
        self.fc1 = Linear(cfg.text_dim, cfg.dim, cfg, **init)
        self.fc2 = Linear(cfg.dim, cfg.dim, cfg, **init)

    def __call__(self, x: Float[Array, "... t"]) -> Float[Array, "... e"]:
        return self.fc2(gelu(self.fc1(x)))


def sinusoid(timestep: Array, width: int) -> Float32[Array, "... w"]:
    """Cosines, then sines, of timestep * 10000^(-2i/width) for timesteps in [0, 1000]."""
    half = width // 2
    freqs = BASE ** (-np.arange(half, dtype=np.float64) / half)
    angle = angles(timestep.astype(jnp.float32), freqs)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimeEmbedding(nnx.Module):
    """Embeds each timestep as a vector, in float32 (bfloat16 under `reference_bf16`)."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        init = {"rngs": rngs, "dtype": time_dtype(cfg), "kernel_init": small_normal}
        self.fc1 = Linear(cfg.freq_dim, cfg.dim, cfg, **init)
        self.fc2 = Linear(cfg.dim, cfg.dim, cfg, **init)

    def __call__(self, timestep: Float[Array, "b g"]) -> Float[Array, "b g e"]:
        x = round_like_reference(sinusoid(timestep, self.cfg.freq_dim), self.cfg)
        return self.fc2(jax.nn.silu(self.fc1(x)))


def time_dtype(cfg: DiTConfig):
    """Dtype of the time path: float32, since it modulates every layer and is cheap.

    bfloat16 under `reference_bf16`.
    """
    return jnp.bfloat16 if cfg.reference_bf16 else jnp.float32
