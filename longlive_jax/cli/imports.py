"""Imports of JAX and the libraries on it, in less time."""

import contextlib
import gc
import sys
from collections.abc import Iterator

__all__ = ["uncollected_imports"]


@contextlib.contextmanager
def uncollected_imports() -> Iterator[None]:
    """Imports without garbage collection, which takes a quarter of their time and finds nothing.

        with uncollected_imports():
            from longlive_jax.sampling.pipeline import Pipeline

    Later collections do not search what was imported. No effect in a process that has imported JAX
    already, because what else lives there may be garbage.
    """
    if "jax" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
