"""Array types of the public signatures, and the decorator that checks them.

Axis names are the same everywhere: `b` batch, `f` frames, `h w` rows and columns, `c` channels,
`l` tokens, `q k` query and key tokens, `n` heads, `d` head width, `e` model width, `s` shots or
prompts, `t` text tokens. Videos and latents are `b f h w c`.

`typechecked` goes on public functions and `__call__`s. It runs while JAX traces, so a wrong shape
fails before compilation and a compiled call costs nothing. jaxtyping's import hook is not used:
it would also check the constructors of pytree dataclasses, and `jax.tree.map(shape_of, tokens)`
legitimately puts things there that are no arrays.

`Array` means `jax.Array` (tracers included); a NumPy array is refused by `typechecked` functions.
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
"""Parameters as pure nested dictionaries of arrays."""


def typechecked[F: Callable[..., Any]](fn: F) -> F:
    """Checks dtypes and shapes of annotated arguments and results; axis names bind per call."""
    return jaxtyped(typechecker=beartype)(fn)
