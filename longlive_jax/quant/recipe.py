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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.quant.arithmetic import Operand, PackedPair, Rounding, arithmetic
from longlive_jax.quant.policy import Format, Recipe
from longlive_jax.typing import Array, Float, Float32
from pallas_kernels.dispatch import Implementation
from pallas_kernels.nvfp4 import BLOCK, Rule

__all__ = ["ProductConfig", "TrainingKernel", "noise_key", "product"]


class Quantized(NamedTuple):
    """A matrix x [m, k] quantized for two products.

    Attributes:
      along: x in blocks along k.
      across: x in blocks along m, perhaps rotated.
      sums: sums of x over m, float32, or None.
    """

    along: Operand
    across: Operand
    sums: Float32[Array, "k"] | None


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

    def quantize(self, x: Float[Array, "m k"], rule: Rule, key: Array | None = None) -> Quantized:
        """Quantizes `x` in blocks along k and, rotated if the recipe says so, along m.

        With a key, both are rounded stochastically and the sums over m are returned too. The first
        result has m rounded up to a multiple of 16. Raises ValueError on a mesh if m is not one.
        """
        ops, rotated = arithmetic(self.implementation), self.recipe.hadamard
        stochastic = self.recipe.stochastic if key is not None else None
        x = self._pad_groups(x)
        seen = ops.statistics(x, rotated=rotated, sums=key is not None)
        how = Rounding(rule)
        if key is not None and stochastic is not None:
            assert seen.sums is not None
            own = noise_key(self.axes, key, jnp.sum(seen.sums))
            first, second = jax.random.split(own)
            how = Rounding(rule, (first, second), stochastic)
        maxima = seen._replace(
            amax=self._global_max(seen.amax), amax_columns=self._global_max(seen.amax_columns)
        )
        return Quantized(*ops.quantize(x, maxima, how, rotated=rotated), seen.sums)

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
    packed: PackedPair,
    bias: Float[Array, "o"],
    key: Array,
) -> Float[Array, "... o"]:
    """`x @ W + bias` in the dtype of `x`, with the recipe's gradients.

    `packed` is the quantized W^T, used in both passes. `master` receives W's gradient; its values
    are not read. `key` is the PRNG key of stochastic rounding.
    """
    return _forward(config, x, master, packed, bias, key)[0]


def _forward(
    config: ProductConfig, x: Array, master: Array, packed: PackedPair, bias: Array, key: Array
):
    ops, rule = arithmetic(config.implementation), config.form.activations
    rows = x.reshape(-1, x.shape[-1])
    along, across, _ = config.quantize(rows, rule)
    y = ops.forward(along, packed, bias, x.dtype)[: rows.shape[0]]
    if config.recipe.twice:
        across = config.quantize(ops.values(along), rule).across
    like = tuple(jnp.zeros((0,), a.dtype) for a in (x, master, bias))
    return y.reshape(*x.shape[:-1], -1), (across, packed, key, like)


def _backward(config: ProductConfig, saved, grad: Array):
    residual, packed, key, like = saved
    ops, recipe = arithmetic(config.implementation), config.recipe
    rows = grad.reshape(-1, grad.shape[-1])
    along, across, db = config.quantize(rows, recipe.gradients, key)
    dx = ops.backward(along, packed, like[0].dtype)[: rows.shape[0]]
    dw = ops.outer(residual, across)
    assert db is not None  # there is a key
    gradients = (dx.reshape(*grad.shape[:-1], -1), dw, db)
    dx, dw, db = (g.astype(a.dtype) for g, a in zip(gradients, like, strict=True))
    return dx, dw, None, db, None


product.defvjp(_forward, _backward)


def noise_key(axes: tuple[str, ...], key: Array, total: Float32[Array, ""]) -> Array:
    """The key of rounding an output gradient whose values sum to `total`.

    It differs between devices and between chunks of tokens with the same key (a feed-forward layer
    may process its tokens in chunks).
    """
    for axis in axes:
        key = jax.random.fold_in(key, lax.axis_index(axis))
    return jax.random.fold_in(key, lax.bitcast_convert_type(total, jnp.uint32))


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
      packed: quantized transpose `[*layers, o, i]` in tiles, recomputed once an update.
      key: `[*layers]` PRNG keys of stochastic rounding.
      config: settings of the product.
    """

    master: Float32[Array, "*layers i o"]
    packed: PackedPair
    key: Array
    config: ProductConfig

    def product(self, x: Float[Array, "... i"], bias: Float[Array, "o"]) -> Float[Array, "... o"]:
        """`x @ kernel + bias` in the dtype of `x`, with the recipe's gradients."""
        return product(self.config, x, self.master, self.packed, bias, self.key)
