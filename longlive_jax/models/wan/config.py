"""Hyper-parameters of the diffusion transformer."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Widths and dtypes of the DiT; the defaults are Wan2.2-TI2V-5B (4,999,787,712 parameters).

    Latents `[b, f, h, w, in_channels]` become f * h/2 * w/2 tokens of width `dim`.

    Attributes:
      dim: model width.
      ffn_dim: hidden width of the feed-forward.
      freq_dim: width of the sinusoidal timestep embedding.
      text_dim: width of the text encoder's output.
      text_len: text tokens per prompt, padding included.
      heads: attention heads.
      layers: transformer blocks.
      in_channels: channels of the input latents.
      out_channels: channels of the velocity.
      eps: epsilon of all norms.
      dtype: dtype of matrix products, keys and values. Norms, softmax, RoPE, the time path,
        modulation and the residual stream within a layer are always float32.
      stream_dtype: dtype of the residual stream between layers, which is also what rematerialised
        training stores per layer. bfloat16, as in the reference, halves that and rounds once per
        layer.
      param_dtype: dtype of the parameters.
      reference_bf16: round to bfloat16 wherever the PyTorch reference, which has no autocast, holds
        bfloat16: time sinusoid, modulation, gates, norm outputs, residual stream, head. For parity
        tests only.
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
    stream_dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    reference_bf16: bool = False

    def __post_init__(self):
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} does not split over {self.heads} heads")
        if self.head_dim % 2:
            raise ValueError(f"head width {self.head_dim} is odd; RoPE rotates pairs of channels")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim {self.freq_dim} is odd; it holds cosines and sines")
        if self.reference_bf16 and jnp.dtype(self.dtype) != jnp.bfloat16:
            raise ValueError(f"reference_bf16 needs dtype bfloat16, not {jnp.dtype(self.dtype)}")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.heads
