"""Inputs on which the NVFP4 kernels are tested, and those of the 5B model's sizes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.kernel import Case
from pallas_kernels.nvfp4 import reference
from pallas_kernels.nvfp4.format import CODE_DTYPE, NVFP4, SCALE_DTYPE, amax_divisor

TOKENS, DIM, HEADS, WIDTH = 7040, 3072, 24, 128
"""Tokens of a chunk of eight latent frames, and channels of the 5B model."""


def _normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape)


INPUTS = {
    "one block": lambda: _normal(1, 16),
    "one row": lambda: _normal(1, 48),
    "ragged groups": lambda: _normal(33, 80) * jnp.exp(2 * _normal(33, 1)),
    "all zero": lambda: jnp.zeros((2, 32)),
    "equal values": lambda: jnp.ones((2, 32)),
    "largest bfloat16": lambda: jnp.full((2, 32), 3.3e38),
    "NaN in a row": lambda: _normal(3, 32).at[1, 3].set(jnp.nan),
}
"""Name of a case -> rows to be quantized."""


def _amax(x: jax.Array, transpose: bool = False, hadamard: bool = False, **_: Any) -> jax.Array:
    """The largest finite magnitude, so that a NaN stays within its block."""
    x = jnp.where(jnp.isfinite(x), x, 0)
    return reference.max_abs(reference.transpose_and_rotate(x, transpose, hadamard))


def quantize_cases(stochastic: bool, dtype: Any, **options: Any) -> tuple[Case, ...]:
    """Cases with the arguments (x, amax[, key]) of a form of `quantize`."""

    def build(rows) -> tuple:
        x = rows()
        x = (x.T if options.get("transpose") else x).astype(dtype)
        key = (jax.random.key(7),) if stochastic else ()
        return x, _amax(x, **options), *key

    # 3.3e38 overflows in the rotation's sums.
    names = [n for n in INPUTS if n != "largest bfloat16" or not options.get("hadamard")]
    general = not options and not stochastic
    quick = INPUTS if general else ("ragged groups",)
    cases = tuple(
        Case(name, functools.partial(build, INPUTS[name]), name not in quick) for name in names
    )
    if options.get("scale_layout") == "tiles":
        program = functools.partial(build, lambda: _normal(64, 128))
        cases = (*cases, Case("one program", program))
    return cases


def quantize_production(rows: int, stochastic: bool, dtype: Any, **options: Any) -> tuple:
    x = _normal(rows, DIM).astype(dtype)
    return x, _amax(x, **options), *((jax.random.key(7),) if stochastic else ())


def both_cases(stochastic: bool) -> tuple[Case, ...]:
    """Cases with the arguments (x, amax, amax of the rotated transpose[, two keys])."""
    inputs = {
        "one program": lambda: _normal(64, 128),
        "two passes": lambda: _normal(16, 80),
        "all zero": lambda: jnp.zeros((64, 128)),
        "NaN in a row": lambda: _normal(192, 128).at[1, 3].set(jnp.nan),
    }
    return tuple(
        Case(
            name,
            functools.partial(_both, x, stochastic),
            slow=name != ("two passes" if stochastic else "NaN in a row"),
            launches=2 if name == "two passes" else 1,
        )
        for name, x in inputs.items()
    )


def _both(make, stochastic: bool) -> tuple:
    x = make().astype(jnp.bfloat16)
    keys = tuple(jax.random.split(jax.random.key(7))) if stochastic else ()
    return x, _amax(x), _amax(x, True, True), *keys


def both_production(stochastic: bool) -> tuple:
    return _both(lambda: _normal(TOKENS, DIM), stochastic)


def statistics_cases() -> tuple[Case, ...]:
    """Cases with the argument x."""
    inputs = {
        "one group of rows": lambda: _normal(16, 16),
        "ragged columns and programs": lambda: _normal(80, 1040),
        "all zero": lambda: jnp.zeros((16, 512)),
        "NaN in a row": lambda: _normal(16, 512).at[1, 3].set(jnp.nan),
    }

    def build(make) -> tuple[jax.Array]:
        return (make().astype(jnp.bfloat16),)

    return tuple(Case(name, functools.partial(build, make)) for name, make in inputs.items())


def statistics_production() -> tuple[jax.Array]:
    return (_normal(TOKENS, DIM).astype(jnp.bfloat16),)


def dequantize_cases() -> tuple[Case, ...]:
    inputs = {
        "one block": lambda: _normal(1, 16),
        "ragged groups": lambda: _normal(37, 128),
        "all zero": lambda: jnp.zeros((2, 32)),
        "NaN in a row": lambda: _normal(3, 32).at[1, 3].set(jnp.nan),
    }
    return tuple(Case(name, functools.partial(_pack, make)) for name, make in inputs.items())


def _pack(make) -> tuple[NVFP4]:
    x = make()
    return (reference.quantize(x, amax=_amax(x)),)


def dequantize_production() -> tuple[NVFP4]:
    return (jax.jit(reference.quantize)(_normal(TOKENS, DIM)),)


def offset_cases() -> tuple[Case, ...]:
    """Cases with the arguments (packed keys, their means)."""
    inputs = {
        "one block": lambda: _normal(1, 1, 1, 16),
        "ragged groups": lambda: _normal(2, 7, 24, 128),
        "all zero": lambda: jnp.zeros((2, 3, 8, 128)),
        "NaN in a row": lambda: _normal(2, 3, 8, 128).at[1, 2, 0, 3].set(jnp.nan),
    }
    return tuple(Case(name, functools.partial(_centred, make)) for name, make in inputs.items())


def _centred(make) -> tuple[NVFP4, jax.Array]:
    x = make()
    offset = _normal(x.shape[0], 1, *x.shape[2:]).astype(jnp.bfloat16)
    return jax.jit(functools.partial(reference.quantize, lead=1))(x), offset


def offset_production() -> tuple[NVFP4, jax.Array]:
    return _centred(lambda: _normal(3, TOKENS, HEADS, WIDTH))


def exact(seed: int, rows: int, k: int) -> NVFP4:
    """Random codes and scales whose products have exact float32 sums in any order."""
    codes, scales = jax.random.split(jax.random.key(seed))
    bits = jax.random.bits(codes, (rows, k // 2), jnp.uint8)
    values = jax.lax.bitcast_convert_type(bits, CODE_DTYPE).reshape(rows, k)
    powers = 2.0 ** jax.random.randint(scales, (rows, k // 16), -2, 3)
    return NVFP4(values, powers.astype(SCALE_DTYPE), jnp.float32(amax_divisor("mse") / 2), "mse")


def product_cases(rank: int) -> tuple[Case, ...]:
    """Cases with the arguments (a, b, bias[, xa, B])."""
    return (
        Case("one row", functools.partial(_product, 1, 1, 16, rank)),
        Case("ragged tiles", functools.partial(_product, 130, 65, 272, rank)),
        Case("tiles do not divide the grid", functools.partial(_product, 300, 200, 48, rank)),
        Case("all zero", functools.partial(_product, 8, 64, 32, rank, amax=0.0)),
        Case("NaN in a row", functools.partial(_product, 8, 64, 32, rank, broken=True)),
    )


def _product(
    m: int, n: int, k: int, rank: int, *, amax: float | None = None, broken: bool = False
) -> tuple:
    a, b = exact(0, m, k), exact(1, n, k)
    scales = a.scales.at[1].set(jnp.nan) if broken else a.scales
    a = NVFP4(a.codes, scales, a.amax if amax is None else jnp.float32(amax), a.rule)
    bias = jax.random.normal(jax.random.key(2), (n,))
    branch = (_integers(3, m, rank), _integers(4, rank, n)) if rank else ()
    return a, b, bias, *branch


def _integers(seed: int, *shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, -8, 9).astype(jnp.bfloat16)


product_production = _product
