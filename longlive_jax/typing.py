"""Array types for public signatures, and the decorator that checks them.

Axis names have the same meaning everywhere: `b` batch, `f` frames, `h w` rows and columns, `c`
channels, `l` tokens, `q k` query and key tokens, `n` heads, `d` head width, `e` model width, `s`
shots or prompts, `t` text tokens. Videos and latents are `b f h w c`.

`typechecked` decorates public functions and `__call__` methods. It runs while JAX traces, so a
wrong shape fails before compilation, and compiled calls have no overhead. jaxtyping's import hook
is not used: it would also check the constructors of pytree dataclasses, into which calls such as
`jax.tree.map(shape_of, tokens)` legitimately put values that are not arrays.

`Array` means `jax.Array`, tracers included; `typechecked` functions reject NumPy arrays.
"""

from collections.abc import Callable
from typing import Any

from beartype import beartype
from jax import Array
from jaxtyping import Bool, Float, Float32, Int, Int32, Key, PyTree, Shaped, UInt8, jaxtyped

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Float32",
    "Int",
    "Int32",
    "Key",
    "Params",
    "PyTree",
    "Shaped",
    "UInt8",
    "typechecked",
]

type Params = dict[str, Any]
"""Model parameters as pure nested dictionaries of arrays."""


def typechecked[F: Callable[..., Any]](fn: F) -> F:
    """Checks dtypes and shapes of annotated arguments and results; axis sizes bind per call."""
    return jaxtyped(typechecker=beartype)(fn)
