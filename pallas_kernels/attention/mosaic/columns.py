"""Mask columns of the kernels: four integers per query and one per key."""

from collections.abc import Callable

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.tokens import Tokens

INVISIBLE = 1 << 30
"""Code of a key that is always masked."""
LIMIT, WINDOW_START, SINK, GLOBAL_SINKS = range(4)
"""Row indices of `MaskColumns.query`."""


@flax.struct.dataclass
class MaskColumns:
    """The mask `visible(q, k)` as integer codes: twice the chunk index, plus one if noisy.

    A query attends to noisy keys whose code equals its LIMIT, and to clean keys with code < LIMIT
    that are >= WINDOW_START, equal to SINK, or < GLOBAL_SINKS.

    Attributes:
      query: LIMIT, WINDOW_START, SINK and GLOBAL_SINKS of each query, as codes.
      key: code of each key; `INVISIBLE` for padding.
    """

    query: Int[Array, "b 4 q"]
    key: Int[Array, "b k"]


def mask_columns(q: Tokens, k: Tokens) -> MaskColumns:
    """Builds the mask columns of `visible(q, k)`; tokens have a batch axis (`pad_tokens`)."""
    clean = ~q.noisy & (q.chunk_index >= 0)
    limit = 2 * (q.chunk_index + clean) + q.noisy
    # A clean query always attends to its own chunk, whatever its window.
    window_start = jnp.where(clean, jnp.minimum(q.window_start, q.chunk_index), q.window_start)
    columns = jnp.stack([limit, 2 * window_start, 2 * q.sink, 2 * q.global_sinks], axis=1)
    code = jnp.where(k.chunk_index >= 0, 2 * k.chunk_index + k.noisy, INVISIBLE)
    return MaskColumns(columns.astype(jnp.int32), code.astype(jnp.int32))


def code_mask(column: Callable[[int], Array], code: Array) -> Bool[Array, "..."]:
    """Evaluates the mask from query columns and key codes.

    `column(i)` returns row i of the query columns, broadcastable against the key codes. Columns are
    read one at a time, where they are used, to limit register pressure.
    """
    in_context = code >= column(WINDOW_START)
    in_context = in_context | (code == column(SINK))
    in_context = in_context | (code < column(GLOBAL_SINKS))
    limit = column(LIMIT)
    noisy = (code & 1) == 1
    return (noisy & (code == limit)) | (~noisy & ((code | 1) < limit) & in_context)
