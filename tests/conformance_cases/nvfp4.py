"""Conformance of NVFP4 quantization and of the Hadamard transform, bit for bit."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from conformance_cases.golden import Golden
from conformance_cases.nvfp4_linear import linear
from conformance_cases.rows import EXACT, Case, compared, differing
from pallas_kernels.nvfp4 import BLOCK, LIMITS, NVFP4, RULES, Rule, pack, quantize, rotate
from pallas_kernels.nvfp4.hadamard import matrix
from pallas_kernels.nvfp4.reference import quantize as quantize_with_noise
from pallas_kernels.nvfp4.reference import transpose_and_rotate

WRAPS = 7.0 * (1 - 1e-6)
"""Value from which on the published code returns -0 where it should round to 6."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How an array is quantized.

    Attributes:
      rule: rule of the block scales.
      block_rows: rows of a block, 1 or 16.
      transpose: whether the array is transposed first.
      hadamard: whether the last axis is rotated.
    """

    rule: Rule = "mse"
    block_rows: int = 1
    transpose: bool = False
    hadamard: bool = False


def quantized(golden: Golden) -> Sequence[Case]:
    """Codes, scales and amax of every `<array>/<rule>/<1d or 2d>` in a file."""
    cases = []
    for key in golden.arrays:
        array, *rest = key.split("/")
        if len(rest) == 3 and rest[-1] == "codes":
            options = Options(_rule(rest[0]), _rows(rest[1]))
            name = f"{array}/{rest[0]}/{rest[1]}"
            cases.append(_case(golden, name, golden[f"{array}/x"], options))
    return cases


def rotated(golden: Golden) -> Sequence[Case]:
    """Cases of a file like `rht.npz`.

    They are the transform, quantization with options, stochastic quantization, and the operands of
    a linear. `nvfp4_linear` adds the linear's results and gradients.
    """
    example = jnp.asarray(golden["rht_example_in"], jnp.bfloat16)
    want = golden["rht_example_out"]
    cases = [
        compared("rht_matrix", EXACT, matrix, golden["rht_matrix"], differing),
        compared("rht_example", EXACT, lambda: np.float32(rotate(example)), want, differing),
    ]
    for name in golden.under("quant/"):
        if name.endswith("/codes"):
            option = name.removesuffix("/codes")
            cases.append(_case(golden, f"quant/{option}", golden["quant_x"], _options(option)))
    for name in golden.under("stochastic/"):
        if name.endswith("/codes"):
            cases.append(_stochastic(golden, name.removesuffix("/codes")))
    for entry in golden.meta["cases"]:
        cases += [_operand(golden, entry["name"], operand) for operand in entry["operands"]]
    return [*cases, *linear(golden)]


def _rule(name: str) -> Rule:
    if name not in RULES:
        raise ValueError(f"rule {name!r}; known are {', '.join(RULES)}")
    return name


def _rows(name: str) -> int:
    return {"1d": 1, "2d": BLOCK}[name]


def _options(option: str) -> Options:
    """Options from the words of a name ("transpose_rht_static_6"); the default rule is mse."""
    words = option.split("_")
    rule = next((rule for rule in RULES if f"_{rule}_" in f"_{option}_"), "mse")
    return Options(rule, BLOCK if "2d" in words else 1, "transpose" in words, "rht" in words)


def _operand(golden: Golden, case: str, entry: dict[str, Any]) -> Case:
    """One operand of a linear's products; all are rounded to nearest."""
    name = f"linear/{case}/{entry['operand']}"
    own = f"{name}_input"
    source = own if own in golden else f"linear/{entry['operand'].split('_')[1]}"
    options = Options(
        _rule(entry["scale_rule"]),
        BLOCK if entry["block_scale_2d"] else 1,
        entry["transpose"],
        entry["rht"],
    )
    return _case(golden, name, golden[source].reshape(entry["input_shape"]), options)


def _case(golden: Golden, name: str, x: np.ndarray, options: Options) -> Case:
    def measure() -> float:
        array = jnp.asarray(x, jnp.bfloat16)
        if not np.array_equal(np.float32(array), x):
            array = jnp.asarray(x, jnp.float32)
        a = quantize(array, **dataclasses.asdict(options))
        return _differing(golden, name, a, _wraps(array, options))

    return Case(name, EXACT, measure)


def _stochastic(golden: Golden, name: str) -> Case:
    """Stochastic quantization with the noise in the file; rules with one candidate need one."""
    key, rule = f"stochastic/{name}", _rule(name)

    def measure() -> float:
        x = jnp.asarray(golden["stochastic_x"])
        names = [k for k in sorted(golden.arrays) if k.startswith(f"{key}/draw")]
        first, last = (jnp.asarray(golden[k]).reshape(x.shape) for k in (names[0], names[-1]))
        a = quantize_with_noise(x, rule=rule, noise=(first, last), stochastic="reference")
        return _differing(golden, key, a, np.zeros(a.scales.shape, bool))

    return Case(key, EXACT, measure)


def _wraps(x: jnp.ndarray, options: Options) -> np.ndarray:
    """Blocks that the published code wraps to -0.

    Their scale is so small that its rounding lifts the largest value beyond 7. Ours saturates at 6
    there and may then prefer the other scale.
    """
    x = np.float32(transpose_and_rotate(x, options.transpose, options.hadamard))
    rows, columns = x.shape[0] // options.block_rows, x.shape[1] // BLOCK
    peak = np.abs(x).reshape(rows, options.block_rows, columns, BLOCK).max((1, 3))
    code, scale = LIMITS[options.rule]
    units = peak.astype(np.float64) * (code * scale) / (peak.max() or 1.0)
    steps = np.asarray(jnp.asarray(units / code, jnp.float8_e4m3fn), np.float64)
    return np.repeat((steps > 0) & (units >= WRAPS * steps), options.block_rows, axis=0)


def _differing(golden: Golden, name: str, a: NVFP4, left_out: np.ndarray) -> float:
    """The largest share of codes, scales or amax that differs, without the excluded blocks."""
    ours = {
        "codes": np.asarray(pack(a.codes)),
        "scales_e4m3": np.asarray(a.scales).view(np.uint8),
        "amax": np.asarray(a.amax).reshape(-1),
    }
    compared_entries = {
        "codes": ~np.repeat(left_out, BLOCK // 2, axis=1),
        "scales_e4m3": ~left_out,
        "amax": np.ones(1, bool),
    }
    shares = []
    for part, got in ours.items():
        want = golden[f"{name}/{part}"]
        if got.shape != want.shape:
            raise ValueError(f"our {part} have shape {got.shape}, the golden's {want.shape}")
        entries = compared_entries[part]
        shares.append(differing(got[entries], want[entries]))
    return max(shares)
