"""The diffusion transformer of Wan 2.2."""

from longlive_jax.models.wan.config import DiTConfig
from longlive_jax.models.wan.dit import GATES, DiT, TextFeatures, TextKV

__all__ = ["GATES", "DiT", "DiTConfig", "TextFeatures", "TextKV"]
