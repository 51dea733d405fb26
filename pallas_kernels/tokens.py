"""Per-token columns, from which the attention mask and the RoPE positions follow.

An attention mode (bidirectional, block-causal, teacher forcing, cached, windowed with sinks) is
not an argument but a set of column values. `visible` defines the mask that every attention
implementation must reproduce.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Real

EMPTY = -1
"""Chunk index of padding tokens and of empty cache slots."""

VISIBILITY_COLUMNS = ("chunk_index", "noisy", "window_start", "sink", "global_sinks")
"""Columns that `visible` reads, one value per token."""


@flax.struct.dataclass
class Tokens:
    """Columns of a token sequence; each may have a leading batch axis.

    `window_start`, `sink` and `global_sinks` are read from queries only. They limit the visible
    context: a past chunk is visible if its index is >= `window_start`, equal to `sink`, or
    < `global_sinks`.
    """

    pos: Real[Array, "*b l 3"]
    """Frame, row and column for RoPE; frames may be fractional."""
    chunk_index: Int[Array, "*b l"]
    """Index of the chunk from the start of the video; keys with `EMPTY` are always masked."""
    noisy: Bool[Array, "*b l"]
    """Whether the token is being denoised; otherwise it is clean context."""
    window_start: Int[Array, "*b l"]
    """First chunk of the attention window; 0 for the whole past."""
    sink: Int[Array, "*b l"]
    """One more visible chunk (the shot sink), or `EMPTY`."""
    global_sinks: Int[Array, "*b l"]
    """Number of leading chunks that stay visible (global sinks)."""
    uniform_mask: bool = flax.struct.field(pytree_node=False, default=False)
    """Whether all queries of a sample have the same mask (one chunk, all noisy or all clean), so
    that the mask is one row per sample. Static; lets implementations avoid a mask."""
    leading: bool = flax.struct.field(pytree_node=False, default=False)
    """Whether, as keys, the visible tokens of a sample precede the masked ones by construction, as
    in a cache that fills its slots in order. Static; a mask row is then a number of keys."""

    def __len__(self) -> int:
        return self.chunk_index.shape[-1]


def make(
    pos,
    chunk_index,
    noisy,
    *,
    window_start=0,
    sink=EMPTY,
    global_sinks=0,
    uniform_mask: bool = False,
    leading: bool = False,
) -> Tokens:
    """Builds tokens from columns or scalars, broadcast to the shape of `pos[..., 0]`.

    Columns given as NumPy arrays or Python numbers stay NumPy. Attention then knows the mask at
    trace time and does no work for masked pairs.
    """
    shapes = (
        pos.shape[:-1],
        *(np.shape(x) for x in (chunk_index, noisy, window_start, sink, global_sinks)),
    )
    batch = np.broadcast_shapes(*shapes)
    columns = (_column(x, batch, np.int32) for x in (chunk_index, window_start, sink, global_sinks))
    chunk_index, window_start, sink, global_sinks = columns
    pos = _namespace(pos).broadcast_to(pos, (*batch, 3))
    return Tokens(
        pos,
        chunk_index,
        _column(noisy, batch, np.bool_),
        window_start,
        sink,
        global_sinks,
        uniform_mask,
        leading,
    )


def is_static(*tokens: Tokens) -> bool:
    """Whether all columns that `visible` reads are NumPy arrays, known when tracing."""
    columns = (getattr(part, name) for part in tokens for name in VISIBILITY_COLUMNS)
    return not any(isinstance(column, jax.Array) for column in columns)


def _namespace(*arrays):
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


def _column(x, shape: tuple[int, ...], dtype) -> Array:
    xp = _namespace(x)
    return xp.broadcast_to(xp.asarray(x, dtype), shape)


def concat(*parts: Tokens) -> Tokens:
    """Concatenates token sequences; batch axes are broadcast."""
    batch = np.broadcast_shapes(*(part.chunk_index.shape[:-1] for part in parts))

    def join(own: int, *columns: Array) -> Array:
        xp = _namespace(*columns)
        wide = [xp.broadcast_to(x, (*batch, *x.shape[-own:])) for x in columns]
        return xp.concatenate(wide, axis=len(batch))

    pos = join(2, *(part.pos for part in parts))
    columns: list[Any] = [
        join(1, *(getattr(part, name) for part in parts)) for name in VISIBILITY_COLUMNS
    ]
    return Tokens(pos, *columns)


def visible(q: Tokens, k: Tokens) -> Bool[Array, "*b q k"]:
    """The attention mask: True where query q attends to key k.

    A noisy query attends to its own noisy chunk and to the clean past, never to the clean copy of
    its own chunk. A clean query attends to its own clean chunk and to the clean past. Noisy tokens
    of other chunks are always masked. Without noisy tokens this is block-causal attention, and
    with a single chunk it is bidirectional attention.
    """
    mine, noisy, window_start = (
        q.chunk_index[..., :, None],
        q.noisy[..., :, None],
        q.window_start[..., :, None],
    )
    theirs = k.chunk_index[..., None, :]
    in_context = (theirs >= window_start) | (theirs == q.sink[..., :, None])
    in_context = in_context | (theirs < q.global_sinks[..., :, None])
    clean = ((theirs < mine) & in_context) | ((theirs == mine) & ~noisy)
    own = noisy & (theirs == mine)
    noisy_key = k.noisy[..., None, :]
    # Operators only, so that NumPy columns give a NumPy mask.
    return ((noisy_key & own) | (~noisy_key & clean)) & (theirs >= 0)


def visible_keys(q: Tokens, k: Tokens) -> Bool[Array, "*b k"]:
    """The single mask row of queries with `uniform_mask`.

    Raises ValueError for queries without `uniform_mask`.
    """
    if not q.uniform_mask:
        raise ValueError("queries differ in their masks; use visible()")
    first = Tokens(q.pos[..., :1, :], *(getattr(q, name)[..., :1] for name in VISIBILITY_COLUMNS))
    return visible(first, k)[..., 0, :]
