"""Packed NVFP4 matrices for inference: W4A4 (paper, section 3.1 and appendix D).

The full-precision matrix is dropped; activations are quantized on the fly, with one amax per call.
A LoRA is either merged before packing, Q(W + B A), or kept as a branch that the product adds in the
same pass: Q(x) Q(W) + (x A) B.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from longlive_jax.quant.arithmetic import PackedPair
from longlive_jax.quant.fp8 import Fp8Kernel, pack_fp8
from longlive_jax.quant.low_rank import LowRank
from longlive_jax.quant.packed_product import FrozenConfig, frozen_product, scale_layout
from longlive_jax.quant.policy import Format, QuantPolicy, Recipe, kernel_path
from longlive_jax.quant.traffic import traffic_note
from longlive_jax.typing import Array, Float, Params
from pallas_kernels.dispatch import Implementation, capability
from pallas_kernels.nvfp4 import (
    NVFP4,
    Rule,
    dequantize,
    linear_implementation,
    quantize,
)

__all__ = [
    "Fp8Kernel",
    "PackedKernel",
    "describe_kernels",
    "pack_kernel",
    "quantize_params",
    "resident_bytes",
    "scale_layout",
]

FUSED_RANK = 128
"""Largest rank of a branch that kernels multiply in the pass of the product."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "branch", "transposed", "key"],
    meta_fields=["activations", "implementation", "recipe", "axes"],
)
@dataclasses.dataclass(frozen=True)
class PackedKernel:
    """An NVFP4 kernel `[*layers, i, o]`, stored transposed.

    Attributes:
      weight: `[*layers, o, i]`, blocks along i.
      branch: unmerged LoRA in high precision, or None.
      activations: scale rule of the activations.
      implementation: implementation of quantize and matmul.
      transposed: `transpose_tiles(weight)` for the gradient of the activations, or None where
        products transpose values (simulated) or have no recipe.
      key: `[*layers]` PRNG keys of stochastic rounding, or None.
      recipe: how the output gradient is quantized; None: not at all.
      axes: mesh axes over which tokens are sharded; () outside of `shard_map`.
    """

    weight: NVFP4
    branch: LowRank | None = None
    activations: Rule = "mse"
    implementation: Implementation = "auto"
    transposed: NVFP4 | None = None
    key: Array | None = None
    recipe: Recipe | None = None
    axes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the original kernel, `[*layers, i, o]`."""
        *layers, outputs, inputs = self.weight.shape
        return (*layers, inputs, outputs)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrix and its transposed copy on the device."""
        return self.weight.nbytes + (0 if self.transposed is None else self.transposed.nbytes)

    def product(self, x: Float[Array, "... i"], bias: Float[Array, "o"]) -> Float[Array, "... o"]:
        """`x @ kernel + bias` in the dtype of `x`.

        Branch and bias are added before the rounding (the reference rounds to bfloat16 first). With
        float32 activations the branch cannot use tensor cores and is added separately, and so is
        one of a rank above `FUSED_RANK`.

        The gradient is that of the dequantized matrix at unquantized activations, dx = dy W^T, with
        dy quantized if there is a recipe. The packed matrix is frozen and has none; the branch and
        the bias have theirs. Differentiating raises ValueError if the recipe needs a key and there
        is none.
        """
        rows, branch = x.reshape(-1, x.shape[-1]), self.branch
        fused = branch is not None and x.dtype == jnp.bfloat16 and branch.b.shape[-2] <= FUSED_RANK
        low_rank = (branch.down(rows), branch.b) if branch is not None and fused else None
        config = FrozenConfig(self.activations, self.implementation, self.recipe, self.axes)
        pair = PackedPair(self.weight, self.transposed)
        y = frozen_product(config, rows, pair, bias, low_rank, self.key)
        if branch is not None and not fused:
            y = y + branch(rows)
        return y.reshape(*x.shape[:-1], -1)

    def dequantized(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "*layers i o"]:
        """The kernel as an array, without its branch."""
        return jnp.swapaxes(dequantize(self.weight, jnp.dtype(dtype)), -1, -2)


@functools.partial(jax.jit, static_argnames=("form", "implementation"))
def pack_kernel(
    kernel: Float[Array, "*layers i o"], form: Format, *, implementation: Implementation = "auto"
) -> PackedKernel | Fp8Kernel:
    """Quantizes a kernel, one layer at a time, so that only one layer is in float32."""
    if form.kind == "fp8":
        return pack_fp8(kernel)

    def quantize_layer(layer: Array) -> NVFP4:
        return quantize(
            layer,
            rule=form.weights,
            block_rows=form.tile,
            transpose=True,
            scale_layout=scale_layout(implementation),
            implementation=implementation,
        )

    weight = quantize_layer(kernel) if kernel.ndim == 2 else lax.map(quantize_layer, kernel)
    return PackedKernel(weight, None, form.activations, implementation)


def quantize_params(
    params: Params,
    policy: QuantPolicy,
    *,
    branches: Mapping[str, LowRank] | None = None,
    implementation: Implementation = "auto",
    dtype: DTypeLike | None = None,
) -> Params:
    """Quantizes the kernels that the policy selects.

    Args:
      params: parameters of a model, kernels `[*layers, i, o]`; abstract under `jax.eval_shape`.
      policy: selects the kernels and their formats.
      branches: unmerged LoRA branches by path of the kernel (`blocks/ffn/up/kernel`).
      implementation: implementation of quantize and matmul.
      dtype: dtype of all other floating-point parameters; None keeps theirs.

    Raises ValueError if the policy does not match the model or a branch has no packed kernel.
    """
    formats, branches = policy.formats(params), dict(branches or {})
    if homeless := sorted(set(branches) - set(formats)):
        raise ValueError(f"{policy.name} packs no kernel at {', '.join(homeless[:4])} for a LoRA")

    def convert(keys: tuple, leaf: Array) -> Any:
        path = kernel_path(keys)
        if path in formats:
            packed = pack_kernel(leaf, formats[path], implementation=implementation)
            return dataclasses.replace(packed, branch=branches.get(path))
        floating = dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if floating else leaf

    return jax.tree_util.tree_map_with_path(convert, params)


def describe_kernels(params: Params) -> tuple[str, ...]:
    """One line for each kind of packed matrix: count, scale rules and implementation."""
    kinds = collections.Counter[str]()
    for node in jax.tree.leaves(params, is_leaf=_is_packed):
        if _is_packed(node):
            kinds[_kind(node)] += math.prod(node.shape[:-2])
    return tuple(f"{count} matrices in {kind}" for kind, count in kinds.items())


def _is_packed(node: Any) -> bool:
    return isinstance(node, PackedKernel | Fp8Kernel)


def _kind(node: PackedKernel | Fp8Kernel) -> str:
    lora = "" if node.branch is None else ", with a LoRA branch"
    if isinstance(node, Fp8Kernel):
        return f"FP8 E4M3{lora}; quantize: xla, matmul: xla"
    rules = f"weights {node.weight.rule}, activations {node.activations}"
    if node.recipe is not None:
        rules += f", gradients {node.recipe.gradients}"
    chosen = linear_implementation(node.implementation, trains=False)
    note = traffic_note(chosen, trains=False) if capability().startswith("10.") else ""
    return f"NVFP4 ({rules}){lora}; quantize: {chosen}, matmul: {chosen}{note}"


def resident_bytes(params: Params) -> dict[str, int]:
    """Bytes on the device: `packed` kernels without their branches, and the `rest`."""
    sizes = {"packed": 0, "rest": 0}
    for node in jax.tree.leaves(params, is_leaf=_is_packed):
        if _is_packed(node):
            sizes["packed"] += node.nbytes
        for leaf in jax.tree.leaves(node.branch) if _is_packed(node) else [node]:
            sizes["rest"] += leaf.size * leaf.dtype.itemsize
    return sizes
