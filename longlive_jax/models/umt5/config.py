"""Sizes of the text encoder."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """Widths of a UMT5 encoder; the defaults are UMT5-XXL (5.7 billion parameters).

    Attributes:
      dim_attn: width of all heads together; it need not equal `dim`.
      buckets: relative-position buckets of every layer's own table, half of them each way.
      max_distance: positions further apart than this share one bucket.
      dtype: what matrix products run in; norms, position bias and softmax are float32 regardless.
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
            raise ValueError(f"buckets is {self.buckets}; it must be a positive multiple of 4")
        if self.max_distance <= self.buckets // 4:
            raise ValueError(
                f"max_distance {self.max_distance} leaves no room for logarithmic buckets; "
                f"make it larger than buckets / 4 = {self.buckets // 4}"
            )
