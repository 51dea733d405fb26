"""Which matrices are quantized, and how: a table from path to format (paper, sections 2.2 and 3.1).

A policy is data. It says nothing about the model: it is given parameters (or their shapes) and
picks kernels by path, `blocks/ffn/up/kernel`, stacked over layers or not. Of Wan2.2-TI2V-5B it
picks the 300 linears of the blocks: those of text, time, patches and head are 2 % of the numbers,
and steer every layer or write the result.
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
from pallas_kernels.nvfp4 import BLOCK, Rule

__all__ = ["POLICIES", "Format", "QuantPolicy", "QuantSpec", "Recipe", "named", "path_of"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a matrix in NVFP4 is trained (paper, section 2.2).

    Attributes:
      gradients: scale rule of what comes back from above.
      stochastic: round it up or down by chance, so that its mean is right; else to nearest.
      hadamard: rotate both operands of the matrix's gradient over runs of 16 tokens (RHT).
      twice: that gradient takes the activations as the forward product saw them, quantized, and
        quantizes them again (the reference); else it quantizes the activations themselves.
    """

    gradients: Rule = "mse"
    stochastic: bool = True
    hadamard: bool = True
    twice: bool = False


@dataclasses.dataclass(frozen=True)
class Format:
    """What a matrix and the activations that meet it are stored in.

    Attributes:
      kind: "nvfp4", or "fp8" (E4M3, a scale a row, a scale a token), which has none of the rest.
      weights: scale rule of the matrix.
      tile: rows that share a scale: 16 (so the transposed matrix has the same blocks) or 1.
      activations: scale rule of what it is multiplied with.
      recipe: of training; None: for inference only.
    """

    kind: Literal["nvfp4", "fp8"] = "nvfp4"
    weights: Rule = "mse"
    tile: Literal[1, 16] = 1
    activations: Rule = "mse"
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        if self.recipe is not None and (self.kind, self.tile) != ("nvfp4", 16):
            raise ValueError("a recipe of training needs NVFP4 in tiles of 16 x 16")

    def __str__(self) -> str:
        if self.kind == "fp8":
            return "FP8 E4M3: a scale a row of the matrix, a scale a token"
        parts = [f"weights {self.weights} in {self.tile}x{BLOCK} blocks"]
        parts.append(f"activations {self.activations}")
        if (recipe := self.recipe) is not None:
            rounding = "stochastic" if recipe.stochastic else "to nearest"
            parts.append(f"gradients {recipe.gradients}, {rounding}")
            parts += ["Hadamard over tokens for the weights' gradient"] * recipe.hadamard
            parts += ["activations quantized twice"] * recipe.twice
        return f"NVFP4: {', '.join(parts)}"


@dataclasses.dataclass(frozen=True)
class QuantPolicy:
    """A name and rules: the first pattern that matches a matrix's whole path says its format.

    A matrix that no pattern matches stays as it is.
    """

    name: str
    rules: tuple[tuple[str, Format], ...] = ()

    @property
    def trains(self) -> bool:
        """Whether every format has a recipe of training."""
        return all(form.recipe is not None for _, form in self.rules)

    def formats(self, params: Params) -> dict[str, Format]:
        """The format of every kernel that has one, by path.

        `params` are arrays or shapes, kernels `[*layers, i, o]`. Raises ValueError for a pattern
        that matches none, and for a matrix whose axes do not split into blocks.
        """
        shapes = kernels(params)
        found: dict[str, Format] = {}
        for pattern, form in self.rules:
            matched = [path for path in shapes if re.fullmatch(pattern, path)]
            if not matched:
                raise ValueError(
                    f"quant.policy {self.name}: no matrix matches {pattern!r}{nearest('', shapes)}"
                )
            found = dict.fromkeys(matched, form) | found
        for path, form in found.items():
            self._check(path, shapes[path], form)
        return {path: found[path] for path in shapes if path in found}

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
        """One line: how many matrices, layers counted, and numbers have which format."""
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
    """Shapes of all matrices by path, layers first where they are stacked."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    found = {path_of(keys): leaf.shape for keys, leaf in leaves}
    return {p: x for p, x in found.items() if p.rpartition("/")[2] == "kernel" and len(x) > 1}


def path_of(keys: tuple) -> str:
    """`blocks/ffn/up/kernel` for the keys of nested dictionaries."""
    return "/".join(str(getattr(key, "key", key)) for key in keys)


def _count(shapes: Any) -> int:
    return sum(math.prod(shape[:-2]) for shape in shapes)


LINEARS = r"blocks/.*/kernel"
"""All linears of the DiT's blocks."""

_POLICIES = (
    QuantPolicy("none"),
    QuantPolicy("nvfp4", ((LINEARS, Format()),)),
    QuantPolicy("fp8", ((LINEARS, Format(kind="fp8")),)),
    QuantPolicy("nvfp4_train", ((LINEARS, Format(weights="static_6", tile=16, recipe=Recipe())),)),
    QuantPolicy(
        "nvfp4_train_reference",
        ((LINEARS, Format(weights="static_6", tile=16, recipe=Recipe(twice=True))),),
    ),
)
POLICIES: Mapping[str, QuantPolicy] = {policy.name: policy for policy in _POLICIES}
"""By name. Rules are the reference's: `nvfp4` those of its packed checkpoints, `nvfp4_train` those
of its AR training."""


def named(name: str) -> QuantPolicy:
    """The policy of this name; ValueError if there is none."""
    if name not in POLICIES:
        raise ValueError(f"quant.policy: unknown {name!r}{nearest(name, POLICIES)}")
    return POLICIES[name]


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """A run's precision.

    Attributes:
      policy: name of one of `POLICIES`.
      implementation: of quantize and of the products; "auto" takes what is proven for the device.
    """

    policy: str = "none"
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        named(self.policy)
