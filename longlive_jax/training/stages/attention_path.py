"""How a run computes self-attention: reported before its first step, and by the planner."""

import jax

from longlive_jax.spec import UserError
from longlive_jax.training.objectives.teacher_forcing import full_history_tokens
from longlive_jax.typing import Array
from pallas_kernels.attention import LAST_RESORT, describe
from pallas_kernels.dispatch import Implementation, Unsupported, platform
from pallas_kernels.tokens import Tokens

LONG = 1 << 15
"""Tokens above which the slowest path is worth a warning: a clip of 3 s at 1280x704."""


def attention_path(
    q: jax.ShapeDtypeStruct,
    *,
    chunks: int,
    full_history: bool,
    implementation: Implementation,
) -> str:
    """How a device attends, as `pallas_kernels.attention.describe` calls it.

    Args:
      q: queries [b, l, n, d] of a device: `chunks` clean and as many noisy chunks.
      chunks: chunks of a clip.
      full_history: whether every chunk attends to its whole past. Otherwise the mask depends on the
        cuts of a sample, so that its columns are data.
      implementation: that of the run.

    Raises UserError if the named implementation cannot run.
    """
    try:
        return _describe(q, chunks, full_history, implementation)
    except Unsupported as error:
        raise UserError(f"config.attention: {error}") from error


def _describe(
    q: jax.ShapeDtypeStruct, chunks: int, full_history: bool, implementation: Implementation
) -> str:
    tokens = full_history_tokens(chunks, q.shape[1] // (2 * chunks))
    if full_history:  # the order of the shards does not change the answer
        return describe(q, tokens, tokens, implementation=implementation)
    paths: list[str] = []

    def trace(tokens: Tokens) -> Array:
        paths.append(describe(q, tokens, tokens, implementation=implementation))
        return tokens.pos

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tokens)
    jax.eval_shape(trace, shapes)
    return paths[0]


def attention_note(path: str, length: int, dtype: str) -> str:
    """A line for the user: the path, with a warning if a GPU takes the slowest for a long clip.

    `length` is the number of tokens of a clip, clean and noisy, and `dtype` that of the run.
    """
    note = f"attention: {path}"
    if path != LAST_RESORT or platform() == "cpu" or length < LONG:
        return note
    remedy = (
        "the mask differs between samples: unset config.window, or name a kernel with a mask by "
        "config.attention=mosaic (compiled, not run on a chip yet)"
    )
    if dtype == "float32":
        remedy = "fused kernels need config.dtype=bfloat16"
    return f"{note}. Warning: a GPU is slow at this, and the clip is long; {remedy}"
