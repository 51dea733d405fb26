"""The matrix product of NVFP4 training, forward and backward (paper, section 2.2; figure 3).

    y  = Q(x) Q(W)              x in blocks of 16 along the inputs, W in tiles of 16 x 16
    dx = Q(dy) Q(W)^T           dy along the outputs, stochastic rounding; W's tiles transpose
    dW = Q(R x)^T Q(R dy)       both along the tokens, rotated by R (RHT); dy stochastic
    db = sum of dy              float32

Products accumulate in float32. The operand x of dW is quantized in the forward pass, from the
original x, and saved for the backward pass instead of x: 4.5 bits per value when packed, 16 when
simulated (`arithmetic`). No activation is quantized twice (the reference does so; see
`Recipe.twice`).

The amax of a tensor is computed over all tokens on all devices (`axes`), so it does not depend on
the mesh. Neither do the blocks, if groups of 16 tokens are on one device. An incomplete last group
is padded with zeros. Rounding noise depends on the index within a device's array, so another mesh
draws other noise from the same distribution.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.quant.arithmetic import Operand, arithmetic
from longlive_jax.quant.policy import Format, Recipe
from longlive_jax.typing import Array, Float, Float32
from pallas_kernels.dispatch import Implementation
from pallas_kernels.nvfp4 import BLOCK, NVFP4, Rule

__all__ = ["ProductConfig", "TrainingKernel", "product"]


@dataclasses.dataclass(frozen=True)
class ProductConfig:
    """Static settings of a product.

    Attributes:
      form: format of the matrix, with a training recipe.
      axes: mesh axes over which tokens are sharded; () outside of `shard_map`.
      implementation: implementation of quantize and matmul.
    """

    form: Format
    axes: tuple[str, ...] = ()
    implementation: Implementation = "auto"

    @property
    def recipe(self) -> Recipe:
        """The training recipe."""
        assert self.form.recipe is not None
        return self.form.recipe

    def quantize(self, x: Float[Array, "m k"], rule: Rule, key: Array | None = None) -> Operand:
        """Quantizes `x` in blocks along k."""
        ops = arithmetic(self.implementation)
        return ops.quantize(x, rule, self._global_max(ops.max_abs(x, False)), key=key)

    def quantize_columns(
        self, x: Float[Array, "m k"], rule: Rule, key: Array | None = None
    ) -> Operand:
        """Quantizes `x` in blocks along m, rotated if the recipe says so.

        Raises ValueError on a mesh if m is not a multiple of 16.
        """
        ops, rotated = arithmetic(self.implementation), self.recipe.hadamard
        x = self._pad_groups(x)
        amax = self._global_max(ops.max_abs(x, rotated))
        return ops.quantize_columns(x, rule, amax, key=key, rotated=rotated)

    def _global_max(self, amax: Array) -> Array:
        return lax.pmax(amax, self.axes) if self.axes else amax

    def _pad_groups(self, x: Array) -> Array:
        """Pads tokens with zeros to a multiple of 16; on a mesh they must be one already."""
        lacking = -x.shape[0] % BLOCK
        if lacking and self.axes:
            raise ValueError(
                f"NVFP4 training needs a multiple of {BLOCK} tokens per device, got {x.shape[0]}; "
                "choose another latent size or mesh"
            )
        return jnp.pad(x, ((0, lacking), (0, 0)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(
    config: ProductConfig,
    x: Float[Array, "... i"],
    master: Float[Array, "i o"],
    packed: NVFP4,
    bias: Float[Array, "o"],
    key: Array,
) -> Float[Array, "... o"]:
    """`x @ W + bias` in the dtype of `x`, with the recipe's gradients.

    `packed` is the quantized W^T, used in both passes. `master` receives W's gradient; its values
    are not read. `key` is the PRNG key of stochastic rounding.
    """
    return _forward(config, x, master, packed, bias, key)[0]


def _forward(
    config: ProductConfig, x: Array, master: Array, packed: NVFP4, bias: Array, key: Array
):
    ops, rule = arithmetic(config.implementation), config.form.activations
    rows = x.reshape(-1, x.shape[-1])
    quantized = config.quantize(rows, rule)
    y = ops.forward(quantized, packed) + bias.astype(jnp.float32)
    residual = config.quantize_columns(ops.values(quantized) if config.recipe.twice else rows, rule)
    like = tuple(jnp.zeros((0,), a.dtype) for a in (x, master, bias))
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1), (residual, packed, key, like)


def _backward(config: ProductConfig, saved, grad: Array):
    residual, packed, key, like = saved
    ops, recipe = arithmetic(config.implementation), config.recipe
    rows = grad.reshape(-1, grad.shape[-1])
    keys = _keys(config, key, rows) if recipe.stochastic else (None, None)
    dx = ops.backward(config.quantize(rows, recipe.gradients, keys[0]), packed)
    dw = ops.outer(residual, config.quantize_columns(rows, recipe.gradients, keys[1]))
    db = jnp.sum(rows.astype(jnp.float32), axis=0)
    gradients = (dx.reshape(*grad.shape[:-1], -1), dw, db)
    dx, dw, db = (g.astype(a.dtype) for g, a in zip(gradients, like, strict=True))
    return dx, dw, None, db, None


product.defvjp(_forward, _backward)


def _keys(config: ProductConfig, key: Array, rows: Float[Array, "m k"]) -> Array:
    """Two keys, one for each quantization of the output gradient.

    They differ between devices and between chunks of tokens with the same key (a feed-forward layer
    may process its tokens in chunks).
    """
    for axis in config.axes:
        key = jax.random.fold_in(key, lax.axis_index(axis))
    total = jnp.sum(rows, dtype=jnp.float32)
    return jax.random.split(jax.random.fold_in(key, lax.bitcast_convert_type(total, jnp.uint32)))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["master", "packed", "key"],
    meta_fields=["config"],
)
@dataclasses.dataclass(frozen=True)
class TrainingKernel:
    """A matrix in NVFP4 training, which replaces an array among a model's parameters.

    Attributes:
      master: float32 `[*layers, i, o]`, receives the gradient.
      packed: quantized transpose `[*layers, o, i]` in tiles, recomputed at every update.
      key: `[*layers]` PRNG keys of stochastic rounding.
      config: settings of the product.
    """

    master: Float32[Array, "*layers i o"]
    packed: NVFP4
    key: Array
    config: ProductConfig

    def product(self, x: Float[Array, "... i"], bias: Float[Array, "o"]) -> Float[Array, "... o"]:
        """`x @ kernel + bias` in the dtype of `x`, with the recipe's gradients."""
        return product(self.config, x, self.master, self.packed, bias, self.key)
