"""Low-rank branches of frozen matrices (LoRA; paper, sections 2.2 and 3.1).

    y = x W + (x A) B * alpha / r        A [i, r], B [r, o], in high precision

`LowRank` is the branch. `LoRAKernel` is a matrix with a branch; it replaces an array among a
model's parameters. Packed kernels fuse the branch into their own product.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax.quant.policy import kernel_path
from longlive_jax.typing import Array, Float, Params

__all__ = ["LoRAKernel", "LowRank", "with_branches"]


@partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["scale"])
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The branch `(x @ a) @ b * scale`.

    Attributes:
      a: down projection, with leading layer axes like the kernel's.
      b: up projection.
      scale: alpha / r.
    """

    a: Float[Array, "*layers i r"]
    b: Float[Array, "*layers r o"]
    scale: float = 1.0

    def down(self, x: Float[Array, "... i"]) -> Float[Array, "... r"]:
        """`x @ a * scale` in the dtype of `x`: the input of `up`."""
        product = jnp.matmul(x, self.a.astype(x.dtype), preferred_element_type=jnp.float32)
        return (product * self.scale).astype(x.dtype)

    def up(self, x: Float[Array, "... r"]) -> Float[Array, "... o"]:
        """`x @ b` in float32, for a result of `down`."""
        return jnp.matmul(x, self.b.astype(x.dtype), preferred_element_type=jnp.float32)

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """The branch's term of the result, in the dtype of `x`."""
        return self.up(self.down(x)).astype(x.dtype)


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
    """Adds each branch to the kernel at its path (`blocks/ffn/up/kernel`).

    Raises ValueError if there is no kernel at a path of `branches`.
    """
    matched: set[str] = set()

    def attach(keys: tuple, leaf: Any) -> Any:
        path = kernel_path(keys)
        if path not in branches:
            return leaf
        matched.add(path)
        return LoRAKernel(leaf, branches[path])

    changed = jax.tree_util.tree_map_with_path(attach, params)
    if lacking := sorted(set(branches) - matched):
        raise ValueError(f"no kernel at {', '.join(lacking[:4])} for a LoRA")
    return changed
