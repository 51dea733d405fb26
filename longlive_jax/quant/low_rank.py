"""Low-rank branches of frozen matrices (LoRA; paper, sections 2.2 and 3.1).

    y = x W + (x A) B * alpha / r        A [i, r], B [r, o], in high precision

`LowRank` is the branch. `LoRAKernel` is a matrix with a branch; it replaces an array among a
model's parameters. Packed kernels fuse the branch into their own product. The matrix is frozen: its
gradient is neither computed nor kept. Gradients of A and B accumulate in float32.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from longlive_jax.quant.policy import kernel_path
from longlive_jax.typing import Array, Float, Float32, Params

__all__ = ["Dropout", "LoRAKernel", "LowRank", "has_product", "with_branches"]


@partial(jax.tree_util.register_dataclass, data_fields=["key"], meta_fields=["rate", "axes"])
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Zeroes entries of a branch's input; what remains is divided by 1 - rate.

    The mask depends on the key alone, so the recomputation of a layer draws the same one. Slices of
    a sequence that pass a layer one by one share a mask.

    Attributes:
      key: `[*layers]` PRNG keys, one for each layer.
      rate: probability that an entry is zeroed, in [0, 1).
      axes: mesh axes over which tokens are sharded; each device draws its own mask.
    """

    key: Array
    rate: float
    axes: tuple[str, ...] = ()

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... i"]:
        """`x` with its own mask, in the dtype of `x`."""
        key = self.key
        for axis in self.axes:
            key = jax.random.fold_in(key, lax.axis_index(axis))
        mask = jax.random.bernoulli(key, 1 - self.rate, x.shape)
        return jnp.where(mask, x / (1 - self.rate), 0).astype(x.dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["a", "b", "dropout"], meta_fields=["scale"])
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The branch `(x @ a) @ b * scale`.

    Attributes:
      a: down projection, with leading layer axes like the kernel's.
      b: up projection.
      scale: alpha / r.
      dropout: dropout of the branch's input, or None.
    """

    a: Float[Array, "*layers i r"]
    b: Float[Array, "*layers r o"]
    scale: float = 1.0
    dropout: Dropout | None = None

    def down(self, x: Float[Array, "... i"]) -> Float[Array, "... r"]:
        """`x @ a * scale` in the dtype of `x`, after dropout: the input of `up`."""
        x = x if self.dropout is None else self.dropout(x)
        return (_matmul(x, self.a) * self.scale).astype(x.dtype)

    def up(self, x: Float[Array, "... r"]) -> Float32[Array, "... o"]:
        """`x @ b` in float32, for a result of `down`."""
        return _matmul(x, self.b)

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """The branch's term of the result, in the dtype of `x`."""
        return self.up(self.down(x)).astype(x.dtype)


@jax.custom_vjp
def _matmul(x: Float[Array, "... i"], w: Float[Array, "i o"]) -> Float32[Array, "... o"]:
    """`x @ w` in the dtype of `x`, summed in float32.

    The gradient of `w` is not rounded to the dtype of `x`, and no 16-bit operand is transposed, for
    which CPUs have no routine.
    """
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)


def _matmul_forward(x, w):
    return _matmul(x, w), (x, w)


def _matmul_backward(saved, grad):
    x, w = saved
    grad, leading = grad.astype(x.dtype), tuple(range(x.ndim - 1))
    to_w = lax.dot_general(
        x, grad, ((leading, leading), ((), ())), preferred_element_type=jnp.float32
    )
    return jnp.einsum("...o,io->...i", grad, w.astype(grad.dtype)), to_w.astype(w.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def _frozen_affine(
    x: Float[Array, "... i"], kernel: Float[Array, "i o"], bias: Float[Array, "o"]
) -> Float[Array, "... o"]:
    """`x @ kernel + bias` in the dtype of `x`; `x` is not kept for the gradient."""
    return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


def _affine_forward(x, kernel, bias):
    return _frozen_affine(x, kernel, bias), (kernel, jnp.zeros((0,), bias.dtype))


def _affine_backward(saved, grad):
    kernel, like = saved
    to_bias = jnp.sum(grad, axis=tuple(range(grad.ndim - 1)), dtype=jnp.float32)
    to_x = jnp.einsum("...o,io->...i", grad, kernel.astype(grad.dtype))
    return to_x, None, to_bias.astype(like.dtype)


_frozen_affine.defvjp(_affine_forward, _affine_backward)


@partial(jax.tree_util.register_dataclass, data_fields=["kernel", "branch"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class LoRAKernel:
    """A frozen kernel with a low-rank branch; LoRA trains only the branch.

    Attributes:
      kernel: the frozen kernel.
      branch: the low-rank branch.
    """

    kernel: Float[Array, "*layers i o"]
    branch: LowRank

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel, `[*layers, i, o]`."""
        return self.kernel.shape

    def product(self, x: Float[Array, "... i"], bias: Float[Array, "o"]) -> Float[Array, "... o"]:
        """`x @ kernel + bias + branch(x)` in the dtype of `x`; the kernel has no gradient."""
        return _frozen_affine(x, lax.stop_gradient(self.kernel), bias) + self.branch(x)

    def merged(self) -> Float[Array, "*layers i o"]:
        """`kernel + a @ b * scale`, summed in float32, in the dtype of the kernel.

        Only one layer at a time is in float32.
        """
        if self.kernel.ndim > 2:
            return lax.map(LoRAKernel.merged, self)
        a, b = (x.astype(jnp.float32) for x in (self.branch.a, self.branch.b))
        total = self.kernel.astype(jnp.float32) + a @ b * self.branch.scale
        return total.astype(self.kernel.dtype)


def has_product(node: Any) -> bool:
    """Whether a node among parameters is a kernel with its own product: packed, or with a branch.

    It is the `is_leaf` of trees in which kernels count as leaves.
    """
    return hasattr(node, "product")


def with_branches(params: Params, branches: Mapping[str, LowRank]) -> Params:
    """Adds each branch to the kernel at its path (`blocks/ffn/up/kernel`).

    An array becomes a `LoRAKernel`; a packed kernel keeps the branch beside it. Trees of
    PartitionSpecs are joined in the same way.

    Raises ValueError if there is no kernel at a path of `branches`, or if it cannot have a branch.
    """
    matched: set[str] = set()

    def attach(keys: tuple, leaf: Any) -> Any:
        path = kernel_path(keys)
        if path not in branches:
            return leaf
        matched.add(path)
        if not has_product(leaf):
            return LoRAKernel(leaf, branches[path])
        if not hasattr(leaf, "branch"):
            raise ValueError(f"{path} is a {type(leaf).__name__}, which takes no LoRA")
        return dataclasses.replace(leaf, branch=branches[path])

    changed = jax.tree_util.tree_map_with_path(
        attach, params, is_leaf=lambda x: has_product(x) or isinstance(x, P)
    )
    if lacking := sorted(set(branches) - matched):
        raise ValueError(f"no kernel at {', '.join(lacking[:4])} for a LoRA")
    return changed
