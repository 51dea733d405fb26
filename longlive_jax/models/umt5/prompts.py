"""Prompts to features: tokenizer and encoder together, every distinct prompt once."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from longlive_jax.models.umt5.encoder import UMT5
from longlive_jax.models.umt5.tokenizer import Tokenizer
from longlive_jax.typing import Array, Bool, Float, Int32


def encode_prompts(
    umt5: UMT5, tokenizer: Tokenizer, prompts: Sequence[str], *, length: int = 512
) -> Float[Array, "b t e"]:
    """Features of every prompt, zero beyond its tokens; equal prompts are encoded once.

    Prompts run through the encoder one at a time, so there is one compilation for a `length`, and a
    prompt's features are the same bits whatever it is encoded together with: a video streamed
    prompt by prompt equals the one sampled from a whole script. A prompt of 512 tokens fills an
    accelerator, so little is lost.

    Raises:
      ValueError: no prompts, or a tokenizer with more pieces than the encoder has embeddings.
    """
    if not prompts:
        raise ValueError("no prompts to encode; give at least one (it may be empty)")
    if tokenizer.vocab_size > umt5.cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the text encoder "
            f"{umt5.cfg.vocab_size} embeddings; use the tokenizer that the encoder was trained with"
        )
    ids, mask = tokenizer.encode(prompts, length)
    rows = [row.tobytes() for row in ids]
    first = {row: i for i, row in reversed(list(enumerate(rows)))}
    features = {row: _encode(umt5, ids[i : i + 1], mask[i : i + 1]) for row, i in first.items()}
    return jnp.concatenate([features[row] for row in rows])


@jax.jit
def _encode(
    umt5: UMT5, ids: Int32[Array, "1 t"], mask: Bool[Array, "1 t"]
) -> Float[Array, "1 t e"]:
    return umt5(ids, mask)
