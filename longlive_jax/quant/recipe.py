"""The matrix product of training in NVFP4, forward and backward (paper, section 2.2; Figure 3).

    y  = Q(x) Q(W)              x in blocks of 16 along the inputs, W in tiles of 16 x 16
    dx = Q(dy) Q(W)^T           dy along the outputs, rounded by chance; W's tiles turn as they are
    dW = Q(R x)^T Q(R dy)       both along the tokens, rotated by R (RHT), dy rounded by chance
    db = sum of dy              float32

Products add up in float32. What dW takes of x is quantized in the forward pass, from the same x as
the other, and waits for the backward pass in the place of x: 4.5 bits a number where arrays are
packed, 16 where they are simulated (`arithmetic`). No activation is quantized from its own
quantized form (`Recipe.twice` is the reference's way, which does).

The scale of a whole tensor is taken over all tokens of all devices that share them out (`axes`), so
it does not depend on the mesh; nor do blocks, if runs of 16 tokens lie on one device. In a last run
that is not full, zeros stand for the rest. What is drawn for rounding belongs to places in a
device's array, so other meshes draw other numbers of the same distribution.
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

__all__ = ["How", "TrainingKernel", "product"]


@dataclasses.dataclass(frozen=True)
class How:
    """What is known of a product before it is computed.

    Attributes:
      form: its format, with a recipe of training.
      axes: of the mesh, over which tokens are shared out; () outside of `shard_map`.
      implementation: of quantize and matmul.
    """

    form: Format
    axes: tuple[str, ...] = ()
    implementation: Implementation = "auto"

    @property
    def recipe(self) -> Recipe:
        """Of training."""
        assert self.form.recipe is not None
        return self.form.recipe

    def quantized(self, x: Float[Array, "m k"], rule: Rule, key: Array | None = None) -> Operand:
        """`x` in blocks along k."""
        by = arithmetic(self.implementation)
        return by.quantize(x, rule, self._over_all(by.largest(x, False)), key=key)

    def across(self, x: Float[Array, "m k"], rule: Rule, key: Array | None = None) -> Operand:
        """`x` in blocks along m, rotated if the recipe says so."""
        by, rotated = arithmetic(self.implementation), self.recipe.hadamard
        x = self._whole_runs(x)
        amax = self._over_all(by.largest(x, rotated))
        return by.across(x, rule, amax, key=key, rotated=rotated)

    def _over_all(self, amax: Array) -> Array:
        return lax.pmax(amax, self.axes) if self.axes else amax

    def _whole_runs(self, x: Array) -> Array:
        """Zeros after the last token up to a whole run; on a mesh runs must be whole already."""
        lacking = -x.shape[0] % BLOCK
        if lacking and self.axes:
            raise ValueError(
                f"{x.shape[0]} tokens of a device are no whole runs of {BLOCK}, which NVFP4 "
                "training rotates; choose a latent size or a mesh that gives a multiple"
            )
        return jnp.pad(x, ((0, lacking), (0, 0)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(
    how: How,
    x: Float[Array, "... i"],
    master: Float[Array, "i o"],
    packed: NVFP4,
    bias: Float[Array, "o"],
    key: Array,
) -> Float[Array, "... o"]:
    """`x @ W + bias` in the dtype of `x`; `packed` is W^T and stands for `master` everywhere.

    `master` gets W's gradient and is not read. `key` is for rounding by chance.
    """
    return _forward(how, x, master, packed, bias, key)[0]


def _forward(how: How, x: Array, master: Array, packed: NVFP4, bias: Array, key: Array):
    by, rule = arithmetic(how.implementation), how.form.activations
    rows = x.reshape(-1, x.shape[-1])
    found = how.quantized(rows, rule)
    y = by.forward(found, packed) + bias.astype(jnp.float32)
    kept = how.across(by.values(found) if how.recipe.twice else rows, rule)
    like = tuple(jnp.zeros((0,), a.dtype) for a in (x, master, bias))
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1), (kept, packed, key, like)


def _backward(how: How, saved, grad: Array):
    kept, packed, key, like = saved
    by, recipe = arithmetic(how.implementation), how.recipe
    rows = grad.reshape(-1, grad.shape[-1])
    keys = _keys(how, key, rows) if recipe.stochastic else (None, None)
    to_x = by.backward(how.quantized(rows, recipe.gradients, keys[0]), packed)
    to_master = by.outer(kept, how.across(rows, recipe.gradients, keys[1]))
    to_bias = jnp.sum(rows.astype(jnp.float32), axis=0)
    found = (to_x.reshape(*grad.shape[:-1], -1), to_master, to_bias)
    to_x, to_master, to_bias = (g.astype(a.dtype) for g, a in zip(found, like, strict=True))
    return to_x, to_master, None, to_bias, None


product.defvjp(_forward, _backward)


def _keys(how: How, key: Array, rows: Float[Array, "m k"]) -> Array:
    """One for either quantization, and others for the same key elsewhere: on another device, and
    for another part of the tokens (as where a feed-forward takes them in parts)."""
    for axis in how.axes:
        key = jax.random.fold_in(key, lax.axis_index(axis))
    part = jnp.sum(rows, dtype=jnp.float32)
    return jax.random.split(jax.random.fold_in(key, lax.bitcast_convert_type(part, jnp.uint32)))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["master", "packed", "key"],
    meta_fields=["how"],
)
@dataclasses.dataclass(frozen=True)
class TrainingKernel:
    """A matrix as the loss sees it, in the place of an array among a model's parameters.

    Attributes:
      master: float32 `[*layers, i, o]`, which gets the gradient.
      packed: the same transposed, `[*layers, o, i]`, in tiles; made once an update.
      key: `[*layers]`, for rounding by chance.
      how: what the product does.
    """

    master: Float32[Array, "*layers i o"]
    packed: NVFP4
    key: Array
    how: How

    def product(self, x: Float[Array, "... i"], bias: Float[Array, "o"]) -> Float[Array, "... o"]:
        """`x @ kernel + bias` in the dtype of `x`, with the recipe's gradients."""
        return product(self.how, x, self.master, self.packed, bias, self.key)
