"""LongLive 2.0 in JAX: from a list of shots to a video.

The names below load on first use, so that `import longlive_jax` (and `longlive --help`)
does not pay for JAX:

    from longlive_jax import Pipeline, ShotScript
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Pipeline": "longlive_jax.sampling.pipeline",
    "ShotScript": "longlive_jax.sampling.script",
    "UserError": "longlive_jax.spec",
}

__all__ = ["Pipeline", "ShotScript", "UserError", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
