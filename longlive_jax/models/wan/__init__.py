"""The diffusion transformer of Wan 2.2."""

from longlive_jax.models.wan.config import DiTConfig
from longlive_jax.models.wan.dit import GATES, DiT, EmbeddedText, TextKV

__all__ = ["GATES", "DiT", "DiTConfig", "EmbeddedText", "TextKV"]
