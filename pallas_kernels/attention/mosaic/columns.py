"""Token columns in the form the kernels mask with: four numbers a query, one a key."""

from collections.abc import Callable

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.tokens import Tokens

NEVER = 1 << 30
"""The code of a key that nobody sees."""
LIMIT, SINCE, SINK, SINKS = range(4)
"""Rows of a query column."""


@flax.struct.dataclass
class MaskColumns:
    """Codes are twice a chunk, plus one if noisy, so that one comparison answers for both.

    A query sees the noisy key whose code is its LIMIT, and clean keys with codes below LIMIT that
    are at least SINCE, equal to SINK, or below SINKS.
    """

    query: Int[Array, "b 4 q"]
    key: Int[Array, "b k"]


def mask_columns(q: Tokens, k: Tokens) -> MaskColumns:
    """`visible(q, k)` as columns; tokens with a batch axis (`pad_tokens`)."""
    clean = ~q.noisy & (q.chunk_index >= 0)
    limit = 2 * (q.chunk_index + clean) + q.noisy
    # A clean query sees its own chunk whatever its window is.
    window_start = jnp.where(clean, jnp.minimum(q.window_start, q.chunk_index), q.window_start)
    columns = jnp.stack([limit, 2 * window_start, 2 * q.sink, 2 * q.global_sinks], axis=1)
    code = jnp.where(k.chunk_index >= 0, 2 * k.chunk_index + k.noisy, NEVER)
    return MaskColumns(columns.astype(jnp.int32), code.astype(jnp.int32))


def seen(column: Callable[[int], Array], code: Array) -> Bool[Array, "..."]:
    """The mask; `column(i)` gives row i of the query columns, broadcastable against key codes.

    Columns are asked for one at a time, where they are used, so that few are in registers at once.
    """
    kept = code >= column(SINCE)
    kept = kept | (code == column(SINK))
    kept = kept | (code < column(SINKS))
    limit = column(LIMIT)
    noisy = (code & 1) == 1
    return (noisy & (code == limit)) | (~noisy & ((code | 1) < limit) & kept)
