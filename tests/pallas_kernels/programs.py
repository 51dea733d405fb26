"""What a traced program holds, its inner programs included."""

from collections.abc import Iterator
from typing import Any

import jax


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner programs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program):
            if is_program(inner):
                yield from equations(getattr(inner, "jaxpr", inner))


def is_program(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def names(jaxpr: Any) -> set[str]:
    """Primitives, and the names of jitted functions."""
    found = set()
    for eqn in equations(jaxpr):
        found |= {eqn.primitive.name, str(eqn.params.get("name", ""))}
    return found
