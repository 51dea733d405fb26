"""A low-rank branch beside a matrix that stays as it is (LoRA; paper, sections 2.2 and 3.1).

    y = x W + (x A) B * alpha / r        A [i, r], B [r, o], in high precision

`LowRank` is the branch, `LoRAKernel` the matrix with it: put among a model's parameters in the
place of an array. Packed kernels take the branch into their own product.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax.quant.policy import path_of
from longlive_jax.typing import Array, Float, Params

__all__ = ["LoRAKernel", "LowRank", "with_branches"]


@partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["scale"])
@dataclasses.dataclass(frozen=True)
class LowRank:
    """`(x @ a) @ b * scale`; both may have leading layer axes, as kernels have."""

    a: Float[Array, "*layers i r"]
    b: Float[Array, "*layers r o"]
    scale: float = 1.0

    def down(self, x: Float[Array, "... i"]) -> Float[Array, "... r"]:
        """`x @ a * scale` in the dtype of `x`: what `b` is still to be multiplied with."""
        found = jnp.matmul(x, self.a.astype(x.dtype), preferred_element_type=jnp.float32)
        return (found * self.scale).astype(x.dtype)

    def up(self, x: Float[Array, "... r"]) -> Float[Array, "... o"]:
        """The result of `down` times `b`, in float32."""
        return jnp.matmul(x, self.b.astype(x.dtype), preferred_element_type=jnp.float32)

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """The branch's share of the result, in the dtype of `x`."""
        return self.up(self.down(x)).astype(x.dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["kernel", "branch"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class LoRAKernel:
    """An array with a branch beside it; only the branch is what LoRA trains."""

    kernel: Float[Array, "*layers i o"]
    branch: LowRank

    def product(self, x: Float[Array, "... i"], bias: Float[Array, "o"]) -> Float[Array, "... o"]:
        """`x @ kernel + bias + branch(x)` in the dtype of `x`."""
        base = x @ self.kernel.astype(x.dtype) + bias.astype(x.dtype)
        return base + self.branch(x)

    def merged(self) -> Float[Array, "*layers i o"]:
        """`kernel + a @ b * scale`, summed in float32, in the dtype of the kernel."""
        a, b = (x.astype(jnp.float32) for x in (self.branch.a, self.branch.b))
        total = self.kernel.astype(jnp.float32) + a @ b * self.branch.scale
        return total.astype(self.kernel.dtype)


def with_branches(params: Params, branches: Mapping[str, LowRank]) -> Params:
    """Parameters in which each kernel at a path of `branches` (`blocks/ffn/up/kernel`) has its one.

    Raises ValueError for a path at which there is no kernel.
    """
    found: set[str] = set()

    def place(keys: tuple, leaf: Any) -> Any:
        path = path_of(keys)
        if path not in branches:
            return leaf
        found.add(path)
        return LoRAKernel(leaf, branches[path])

    changed = jax.tree_util.tree_map_with_path(place, params)
    if lacking := sorted(set(branches) - found):
        raise ValueError(f"no kernel at {', '.join(lacking[:4])} for a LoRA")
    return changed
