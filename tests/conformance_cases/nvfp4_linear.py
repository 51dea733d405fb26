"""Conformance of the linear of NVFP4 training: result and gradients, rounded to nearest.

The golden rounds every product to bfloat16, while ours stay float32. Errors are therefore measured
from the nearest value that rounds to the golden's. The golden's bias gradient is summed in bfloat16
and compared with a bfloat16 tolerance.
"""

import functools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conformance_cases.golden import Golden
from conformance_cases.rows import TIGHT, Case, compared
from longlive_jax.quant.arithmetic import PackedPair
from longlive_jax.quant.policy import Format, Recipe
from longlive_jax.quant.recipe import ProductConfig, product
from pallas_kernels.nvfp4 import quantize

BFLOAT16 = 2.0**-8
"""Tolerance of sums in bfloat16."""


def linear(golden: Golden) -> Sequence[Case]:
    """Cases `linear/<rules>/{y,dx,dw,db}` of a file like `rht.npz`."""
    return [
        case
        for entry in golden.meta["cases"]
        if f"linear/{entry['name']}/y" in golden
        for case in _cases(golden, entry["name"], entry["rules"])
    ]


def format_of(rules: Mapping[str, Any]) -> Format:
    """The format that a golden's rules name."""
    common = rules.get("scale_rule", "mse")
    return Format(
        weights=rules.get("weight_scale_rule", common),
        tile=16,
        activations=rules.get("activation_scale_rule", common),
        recipe=Recipe(
            gradients=rules.get("gradient_scale_rule", common), stochastic=None, twice=True
        ),
    )


def _cases(golden: Golden, name: str, rules: Mapping[str, Any]) -> list[Case]:
    results = functools.cache(lambda: _results(golden, format_of(rules)))
    bias = np.asarray(golden["linear/b"], np.float64)

    def got(key: str) -> Any:
        return results()[key]

    cases = []
    for key in ("y", "dx", "dw"):
        path = f"linear/{name}/{key}"
        metric = partial(_beyond_rounding, bias=bias if key == "y" else None)
        cases.append(compared(path, TIGHT, partial(got, key), golden[path], metric))
    path = f"linear/{name}/db"
    return [*cases, compared(path, BFLOAT16, partial(got, "db"), golden[path])]


def _results(golden: Golden, form: Format) -> dict[str, Any]:
    x, w, b, dy = (jnp.asarray(golden[f"linear/{key}"]) for key in ("x", "w", "b", "dy"))
    config = ProductConfig(
        form, implementation="reference"
    )  # with equal errors it picks the golden's scale

    @jax.jit
    def run(x, kernel, b, dy):
        options: dict[str, Any] = {"implementation": "reference", "transpose": True}
        packed = PackedPair(quantize(kernel, rule=form.weights, block_rows=form.tile, **options))
        key = jax.random.key(0)
        y, back = jax.vjp(lambda x, k, b: product(config, x, k, packed, b, key), x, kernel, b)
        return y, *back(dy)

    y, dx, dw, db = run(x, w.T, b, dy)
    return {"y": y, "dx": dx, "dw": dw.T, "db": db}


def _beyond_rounding(got: Any, want: Any, *, bias: np.ndarray | None) -> float:
    """max |got - want| beyond half a bfloat16 unit in the last place, over max |want|.

    With a bias, another half unit of the sum before it is allowed.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise ValueError(f"ours has shape {got.shape}, the golden {want.shape}")
    room = _half_place(want)
    if bias is not None:
        room = np.maximum(room, _half_place(got)) + _half_place(got - bias)
    return float(np.max(np.maximum(np.abs(got - want) - room, 0)) / np.max(np.abs(want)))


def _half_place(x: np.ndarray) -> np.ndarray:
    """Half a unit in the last place of a bfloat16, which has 8 significant bits."""
    return np.ldexp(1.0, np.frexp(x)[1] - 9)
