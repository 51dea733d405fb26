"""LongLive 2.0 in JAX: from a list of shots to a video.

The names below load on first use, so that `import longlive_jax` (and `longlive --help`)
does not pay for JAX:

    from longlive_jax import Pipeline, ShotScript
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longlive_jax.io.compilation_cache import enable_compilation_cache
    from longlive_jax.io.video import write_video
    from longlive_jax.sampling.pipeline import Pipeline
    from longlive_jax.sampling.script import Shot, ShotScript, read_scripts
    from longlive_jax.sampling.settings import SampleSpec
    from longlive_jax.spec import UserError

__version__ = "0.1.0"

_HOMES = {
    "Pipeline": "longlive_jax.sampling.pipeline",
    "SampleSpec": "longlive_jax.sampling.settings",
    "Shot": "longlive_jax.sampling.script",
    "ShotScript": "longlive_jax.sampling.script",
    "UserError": "longlive_jax.spec",
    "enable_compilation_cache": "longlive_jax.io.compilation_cache",
    "read_scripts": "longlive_jax.sampling.script",
    "write_video": "longlive_jax.io.video",
}

__all__ = [
    "Pipeline",
    "SampleSpec",
    "Shot",
    "ShotScript",
    "UserError",
    "__version__",
    "enable_compilation_cache",
    "read_scripts",
    "write_video",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
