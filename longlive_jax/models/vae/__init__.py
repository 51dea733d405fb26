"""The causal 3-D VAE of Wan 2.2."""

from longlive_jax.models.vae.config import VAEConfig
from longlive_jax.models.vae.vae import (
    VAE,
    decode,
    decode_chunk,
    encode,
    encode_chunk,
    normalize_frames,
)

__all__ = [
    "VAE",
    "VAEConfig",
    "decode",
    "decode_chunk",
    "encode",
    "encode_chunk",
    "normalize_frames",
]
