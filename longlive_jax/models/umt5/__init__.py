"""The text encoder: UMT5, its tokenizer, and `encode_prompts`, which combines them."""

from longlive_jax.models.umt5.config import UMT5Config
from longlive_jax.models.umt5.encoder import UMT5
from longlive_jax.models.umt5.prompts import encode_prompts
from longlive_jax.models.umt5.tokenizer import Tokenizer, Truncation, clean

__all__ = ["UMT5", "Tokenizer", "Truncation", "UMT5Config", "clean", "encode_prompts"]
