"""The product of a frozen packed matrix, and the gradient of its activations.

    y  = Q(x) Q(W) + low-rank product + bias
    dx = Q(dy) Q(W)^T               with a recipe: dy along the outputs, stochastic rounding
    dx = dy Q(W)^T                  without one

There is no dW. The transposed tiles have the values of W, so both gradients agree up to the
rounding of dy. The low-rank factors and the bias have exact gradients, from the unquantized dy.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.quant.arithmetic import Arithmetic, Operand, PackedPair, Rounding, arithmetic
from longlive_jax.quant.policy import Recipe
from longlive_jax.quant.recipe import noise_key
from longlive_jax.typing import Array, Float
from pallas_kernels.dispatch import Implementation
from pallas_kernels.nvfp4 import Rule, ScaleLayout, dequantize, linear_implementation
from pallas_kernels.nvfp4.reference import max_abs

__all__ = ["FrozenConfig", "frozen_product", "scale_layout"]

type LowRankFactors = tuple[Float[Array, "m r"], Float[Array, "r o"]]


@dataclasses.dataclass(frozen=True)
class FrozenConfig:
    """Static settings of a frozen product.

    Attributes:
      activations: scale rule of the activations.
      implementation: implementation of quantize and matmul.
      recipe: how dy is quantized; None multiplies dy as it is.
      axes: mesh axes over which tokens are sharded; () outside of `shard_map`.
    """

    activations: Rule = "mse"
    implementation: Implementation = "auto"
    recipe: Recipe | None = None
    axes: tuple[str, ...] = ()

    @property
    def arithmetic(self) -> Arithmetic:
        """The arithmetic of the implementation."""
        return arithmetic(self.implementation, trains=False)

    def amax(self, x: Float[Array, "m k"]) -> Array:
        """max |x| over the tokens of all devices."""
        own = max_abs(x)
        return lax.pmax(own, self.axes) if self.axes else own


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def frozen_product(
    config: FrozenConfig,
    x: Float[Array, "m i"],
    packed: PackedPair,
    bias: Float[Array, "o"],
    low_rank: LowRankFactors | None,
    key: Array | None,
) -> Float[Array, "m o"]:
    """`x @ W + bias + low-rank product` in the dtype of `x`, from quantized `x`.

    `key` is the PRNG key of stochastic rounding. Differentiating raises ValueError if the recipe
    rounds stochastically and there is no key.
    """
    ops = config.arithmetic
    along = ops.quantize_rows(x, config.amax(x), Rounding(config.activations))
    return ops.forward(along, packed, bias, x.dtype, low_rank)


def _forward(config: FrozenConfig, x, packed, bias, low_rank, key):
    like = tuple(jnp.zeros((0,), a.dtype) for a in (x, bias))
    y = frozen_product(config, x, packed, bias, low_rank, key)
    return y, (packed, low_rank, key, like)


def _backward(config: FrozenConfig, saved, grad: Array):
    packed, low_rank, key, like = saved
    if config.recipe is None:
        values = dequantize(packed.weight, grad.dtype, implementation=config.implementation)
        dx = jnp.matmul(grad, values, preferred_element_type=jnp.float32)
    else:
        along = _quantize_gradient(config, config.recipe, grad, key)
        dx = config.arithmetic.backward(along, packed, like[0].dtype)
    dx = dx.astype(like[0].dtype)
    dbias = jnp.sum(grad, axis=0, dtype=jnp.float32).astype(like[1].dtype)
    if low_rank is None:
        return dx, None, dbias, None, None
    # Contractions of axes as they are: CPUs have no 16-bit routine for transposed operands.
    down, up = low_rank
    contract = partial(lax.dot_general, preferred_element_type=jnp.float32)
    ddown = contract(grad, up.astype(grad.dtype), (((1,), (1,)), ((), ())))
    dup = contract(down, grad.astype(down.dtype), (((0,), (0,)), ((), ())))
    return dx, None, dbias, (ddown.astype(down.dtype), dup.astype(up.dtype)), None


frozen_product.defvjp(_forward, _backward)


def _quantize_gradient(
    config: FrozenConfig, recipe: Recipe, grad: Float[Array, "m o"], key: Array | None
) -> Operand:
    """dy in blocks along the outputs, rounded as the recipe says."""
    how = Rounding(recipe.gradients)
    if recipe.stochastic is not None:
        if key is None:
            raise ValueError(
                "the gradient of a frozen kernel is rounded stochastically and needs keys; "
                "call `quant.frozen.with_rounding_keys(params, key)` before differentiating"
            )
        total = jnp.sum(grad, dtype=jnp.float32)
        own = noise_key(config.axes, key, total)
        how = Rounding(recipe.gradients, (own, None), recipe.stochastic)
    return config.arithmetic.quantize_rows(grad, config.amax(grad), how)


def scale_layout(implementation: Implementation) -> ScaleLayout:
    """The order in which this implementation's product reads scales."""
    chosen = linear_implementation(implementation, trains=False)
    return "tiles" if chosen == "mosaic" else "rows"
