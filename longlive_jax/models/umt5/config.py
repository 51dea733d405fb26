"""Hyper-parameters of the text encoder."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """Hyper-parameters of a UMT5 encoder; the defaults are UMT5-XXL (5.7 billion parameters).

    Attributes:
      vocab_size: number of token embeddings.
      dim: width of the residual stream.
      dim_attn: total width of all attention heads; it need not equal `dim`.
      ffn_dim: hidden width of the feed-forward layers.
      heads: number of attention heads.
      layers: number of encoder layers.
      buckets: number of relative-position buckets in each layer's table, half per direction.
      max_distance: smallest distance whose bucket is shared by all larger distances.
      eps: epsilon of the norms.
      dtype: dtype of matrix products; norms, position bias and softmax are always float32.
      param_dtype: dtype of the parameters.
    """

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    ffn_dim: int = 10240
    heads: int = 64
    layers: int = 24
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        if self.dim_attn % self.heads:
            raise ValueError(
                f"dim_attn {self.dim_attn} does not split over {self.heads} heads; "
                "make it a multiple of heads"
            )
        if self.buckets < 4 or self.buckets % 4:
            raise ValueError(f"buckets must be a positive multiple of 4, got {self.buckets}")
        if self.max_distance <= self.buckets // 4:
            raise ValueError(
                f"max_distance {self.max_distance} leaves no room for logarithmic buckets; "
                f"make it larger than buckets / 4 = {self.buckets // 4}"
            )
