"""Quantization policies: tables from parameter path to format (paper, sections 2.2 and 3.1).

A policy is data and independent of the model: given parameters or their shapes, it selects kernels
by path (`blocks/ffn/up/kernel`), stacked over layers or not. In Wan2.2-TI2V-5B the policies here
select the 300 linears of the blocks. The linears of text, time, patches and head stay in high
precision: they are 2 % of the parameters, and every layer or the output depends on them.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax

from longlive_jax.spec import nearest
from longlive_jax.typing import Params
from pallas_kernels.dispatch import Implementation
from pallas_kernels.nvfp4 import BLOCK, Rule, StochasticRounding

__all__ = ["LINEARS", "POLICIES", "Format", "QuantPolicy", "QuantSpec", "Recipe", "kernel_path"]
__all__ += ["named"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Training recipe of an NVFP4 matrix (paper, section 2.2).

    `hadamard` and `twice` are about the weight gradient, which a frozen matrix has not.

    Attributes:
      gradients: scale rule of the output gradient.
      stochastic: how the output gradient is rounded stochastically: "unbiased", or "reference" as
        published, with a bias of 1 to 2 %; None rounds to nearest.
      hadamard: rotate both operands of the weight gradient over groups of 16 tokens (RHT).
      twice: compute the weight gradient from the activations of the forward product, quantized a
        second time (as the reference does); else quantize the original activations.
      frozen: the matrix is not trained; only the activations have a gradient.
    """

    gradients: Rule = "mse"
    stochastic: StochasticRounding | None = "unbiased"
    hadamard: bool = True
    twice: bool = False
    frozen: bool = False


@dataclasses.dataclass(frozen=True)
class Format:
    """Format of a matrix and of its activations.

    Attributes:
      kind: "nvfp4", or "fp8" (E4M3, one scale per row and per token), which ignores the rest.
      weights: scale rule of the matrix.
      tile: rows that share a scale: 16 (the transposed matrix then has the same blocks) or 1.
      activations: scale rule of the activations.
      recipe: training recipe, or None for inference only.
    """

    kind: Literal["nvfp4", "fp8"] = "nvfp4"
    weights: Rule = "mse"
    tile: Literal[1, 16] = 1
    activations: Rule = "mse"
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        if self.recipe is not None and (self.kind, self.tile) != ("nvfp4", 16):
            raise ValueError("a training recipe needs NVFP4 in tiles of 16 x 16")

    def __str__(self) -> str:
        if self.kind == "fp8":
            return "FP8 E4M3: one scale per matrix row, one per token"
        parts = [f"weights {self.weights} in {self.tile}x{BLOCK} blocks"]
        parts.append(f"activations {self.activations}")
        if (recipe := self.recipe) is not None:
            kind = recipe.stochastic
            rounding = "to nearest" if kind is None else f"stochastic rounding ({kind})"
            parts.append(f"gradients {recipe.gradients}, {rounding}")
            if recipe.frozen:
                return f"NVFP4: {', '.join(parts)}, frozen"
            parts += ["Hadamard over tokens for the weight gradient"] * recipe.hadamard
            parts += ["activations quantized twice"] * recipe.twice
        return f"NVFP4: {', '.join(parts)}"


@dataclasses.dataclass(frozen=True)
class QuantPolicy:
    """A named list of rules; the first pattern that matches a matrix's full path gives its format.

    Matrices that match no pattern are not quantized.

    Attributes:
      name: name of the policy.
      rules: pairs of a regular expression and a format.
    """

    name: str
    rules: tuple[tuple[str, Format], ...] = ()

    @property
    def trains(self) -> bool:
        """Whether every format has a training recipe, and no matrix is frozen."""
        recipes = [form.recipe for _, form in self.rules]
        return all(recipe is not None and not recipe.frozen for recipe in recipes)

    def formats(self, params: Params) -> dict[str, Format]:
        """The formats of the selected kernels, by path.

        `params` are arrays or shapes, kernels `[*layers, i, o]`. Raises ValueError if a pattern
        matches nothing or the axes of a matrix do not split into blocks.
        """
        shapes = kernels(params)
        formats: dict[str, Format] = {}
        for pattern, form in self.rules:
            matched = [path for path in shapes if re.fullmatch(pattern, path)]
            if not matched:
                raise ValueError(
                    f"quant.policy {self.name}: no matrix matches {pattern!r}{nearest('', shapes)}"
                )
            formats = dict.fromkeys(matched, form) | formats
        for path, form in formats.items():
            self._check(path, shapes[path], form)
        return {path: formats[path] for path in shapes if path in formats}

    def _check(self, path: str, shape: tuple[int, ...], form: Format) -> None:
        axes = {"inputs": shape[-2]}
        if form.tile > 1 or form.recipe is not None:
            axes["outputs"] = shape[-1]
        for name, size in axes.items():
            if size % BLOCK:
                raise ValueError(
                    f"quant.policy {self.name}: {path} has {size} {name}, which do not split into "
                    f"blocks of {BLOCK}; choose a width that does, or leave it out of the policy"
                )

    def describe(self, params: Params) -> str:
        """One line: the number of matrices (counted per layer) and the share of parameters in each
        format."""
        if not self.rules:
            return f"{self.name}: no matrix is quantized"
        shapes, formats = kernels(params), self.formats(params)
        everything = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
        texts = []
        for form in dict.fromkeys(formats.values()):
            chosen = [shapes[path] for path, other in formats.items() if other == form]
            share = 100 * sum(map(math.prod, chosen)) / everything
            counts = f"{_count(chosen)} of {_count(shapes.values())} matrices"
            texts.append(f"{counts} ({share:.1f} % of all parameters) in {form}")
        return f"{self.name}: {'; '.join(texts)}"


def kernels(params: Params) -> dict[str, tuple[int, ...]]:
    """Shapes of all matrices by path; stacked matrices have leading layer axes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    shapes = {kernel_path(keys): leaf.shape for keys, leaf in leaves}
    return {p: x for p, x in shapes.items() if p.rpartition("/")[2] == "kernel" and len(x) > 1}


def kernel_path(keys: tuple) -> str:
    """The path of a leaf, `blocks/ffn/up/kernel`, from its pytree keys."""
    return "/".join(str(getattr(key, "key", key)) for key in keys)


def _count(shapes: Any) -> int:
    return sum(math.prod(shape[:-2]) for shape in shapes)


LINEARS = r"blocks/.*/kernel"
"""Pattern of all linears in the DiT's blocks."""

_POLICIES = (
    QuantPolicy("none"),
    QuantPolicy("nvfp4", ((LINEARS, Format()),)),
    QuantPolicy("fp8", ((LINEARS, Format(kind="fp8")),)),
    QuantPolicy("nvfp4_train", ((LINEARS, Format(weights="static_6", tile=16, recipe=Recipe())),)),
    QuantPolicy(
        "nvfp4_train_reference",
        (
            (
                LINEARS,
                Format(
                    weights="static_6", tile=16, recipe=Recipe(stochastic="reference", twice=True)
                ),
            ),
        ),
    ),
    QuantPolicy("nvfp4_frozen", ((LINEARS, Format(tile=16, recipe=Recipe(frozen=True))),)),
)
POLICIES: Mapping[str, QuantPolicy] = {policy.name: policy for policy in _POLICIES}
"""Policies by name. Scale rules are the reference's: `nvfp4` uses those of its packed checkpoints,
`nvfp4_train` those of its AR training, `nvfp4_frozen` those of its distillation."""


def named(name: str) -> QuantPolicy:
    """The policy of this name; raises ValueError if there is none."""
    if name not in POLICIES:
        raise ValueError(f"quant.policy: unknown {name!r}{nearest(name, POLICIES)}")
    return POLICIES[name]


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """Quantization settings of a run.

    Attributes:
      policy: "none"; "nvfp4" or "fp8" to sample; "nvfp4_train" to train, or
        "nvfp4_train_reference" with activations quantized twice and the stochastic rounding of the
        reference; "nvfp4_frozen" or "fp8" below a LoRA that is trained.
      implementation: implementation of quantize and matmul; "auto" selects one that has been tested
        on the device.
    """

    policy: str = "none"
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        named(self.policy)
