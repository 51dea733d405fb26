"""Hyper-parameters of the diffusion transformer."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Widths of the DiT; the defaults are Wan2.2-TI2V-5B (4,999,787,712 parameters).

    Latents `[b, f, h, w, in_channels]` become f * h/2 * w/2 tokens of width `dim`.
    """

    dim: int = 3072
    ffn_dim: int = 14336
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    heads: int = 24
    layers: int = 30
    in_channels: int = 48
    out_channels: int = 48
    eps: float = 1e-6
    dtype: DTypeLike = jnp.float32
    """Of matrix products, keys and values. Norms, softmax, RoPE, the time path, modulation and the
    residual stream within a layer are float32 whatever it is."""
    stream_dtype: DTypeLike = jnp.float32
    """Of the residual stream from layer to layer, and so of what rematerialised training keeps of
    every layer. bfloat16, as the reference has it, halves that and rounds once a layer."""
    param_dtype: DTypeLike = jnp.float32
    reference_bf16: bool = False
    """Round to bfloat16 wherever the PyTorch reference holds bfloat16 (it has no autocast): time
    sinusoid, modulation, gates, norm outputs, residual stream, head. For parity only."""

    def __post_init__(self):
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} does not split over {self.heads} heads")
        if self.head_dim % 2:
            raise ValueError(f"head width {self.head_dim} is odd; RoPE turns pairs of channels")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim {self.freq_dim} is odd; it holds cosines and sines")
        if self.reference_bf16 and jnp.dtype(self.dtype) != jnp.bfloat16:
            raise ValueError(f"reference_bf16 needs dtype bfloat16, not {jnp.dtype(self.dtype)}")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.heads
