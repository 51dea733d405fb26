"""Prompts to text features: the tokenizer and the encoder, run once per distinct prompt."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from longlive_jax.models.umt5.encoder import UMT5
from longlive_jax.models.umt5.tokenizer import Tokenizer
from longlive_jax.typing import Array, Bool, Float, Int32


def encode_prompts(
    umt5: UMT5, tokenizer: Tokenizer, prompts: Sequence[str], *, length: int = 512
) -> Float[Array, "b t e"]:
    """Features of each prompt, zero beyond its tokens; equal prompts are encoded once.

    Prompts are encoded one at a time. So there is one compilation per `length`, and a prompt's
    features are bit-identical whatever it is encoded together with: a video streamed prompt by
    prompt equals one sampled from the full script. This costs little, because one prompt of 512
    tokens already fills an accelerator.

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
    row_keys = [row.tobytes() for row in ids]
    first = {key: i for i, key in reversed(list(enumerate(row_keys)))}
    features = {key: _encode(umt5, ids[i : i + 1], mask[i : i + 1]) for key, i in first.items()}
    return jnp.concatenate([features[key] for key in row_keys])


@jax.jit
def _encode(
    umt5: UMT5, ids: Int32[Array, "1 t"], mask: Bool[Array, "1 t"]
) -> Float[Array, "1 t e"]:
    return umt5(ids, mask)
