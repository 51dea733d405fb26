"""What each token is. Which keys a query may see, and where RoPE puts it, follow from this alone.

A mode of attention (bidirectional, block-causal, teacher-forced, cached, windowed with sinks) is
not an argument but a set of columns; `visible` is the whole contract that an implementation keeps.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Real

EMPTY = -1
"""The chunk of a cache slot or padding token that holds nothing."""

COLUMNS = ("chunk_index", "noisy", "window_start", "sink", "global_sinks")
"""What `visible` reads, one value a token."""


@flax.struct.dataclass
class Tokens:
    """Columns of a token sequence; every one may have a leading batch axis.

    `window_start`, `sink` and `global_sinks` are read from queries only, and limit how far back
    they look: a past chunk is kept if it is at least `window_start`, or equals `sink`, or is below
    `global_sinks`.
    """

    pos: Real[Array, "*b l 3"]
    """Frame, row and column for RoPE; frames may be fractional."""
    chunk_index: Int[Array, "*b l"]
    """Index of the chunk, counted from the start of the video; `EMPTY` is seen by nobody."""
    noisy: Bool[Array, "*b l"]
    """Being denoised; otherwise clean context."""
    window_start: Int[Array, "*b l"]
    """The oldest chunk of the window; 0 is all of the past."""
    sink: Int[Array, "*b l"]
    """One more chunk that stays visible (the shot sink), or `EMPTY`."""
    global_sinks: Int[Array, "*b l"]
    """So many first chunks stay visible."""
    uniform_mask: bool = flax.struct.field(pytree_node=False, default=False)
    """All tokens of a sample see the same keys (they are of one chunk, all noisy or all clean), so
    that the mask is one row a sample. Known while tracing; lets implementations skip the mask."""

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
) -> Tokens:
    """Tokens from columns or scalars; everything is broadcast to the shape of `pos[..., 0]`.

    Columns given as NumPy arrays or Python numbers stay NumPy: attention then knows the mask while
    it traces, and does no work for pairs that are never visible.
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
    )


def _namespace(*arrays):
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


def _column(x, shape: tuple[int, ...], dtype) -> Array:
    xp = _namespace(x)
    return xp.broadcast_to(xp.asarray(x, dtype), shape)


def concat(*parts: Tokens) -> Tokens:
    """One sequence after the other; batch axes are broadcast."""
    batch = np.broadcast_shapes(*(part.chunk_index.shape[:-1] for part in parts))

    def join(own: int, *columns: Array) -> Array:
        xp = _namespace(*columns)
        wide = [xp.broadcast_to(x, (*batch, *x.shape[-own:])) for x in columns]
        return xp.concatenate(wide, axis=len(batch))

    pos = join(2, *(part.pos for part in parts))
    columns: list[Any] = [join(1, *(getattr(part, name) for part in parts)) for name in COLUMNS]
    return Tokens(pos, *columns)


def visible(q: Tokens, k: Tokens) -> Bool[Array, "*b q k"]:
    """Which queries see which keys.

    A noisy query sees its own noisy chunk and the clean past, never its own clean copy; a clean one
    sees its own clean chunk and the clean past; nobody sees noisy tokens of another chunk. Without
    noisy tokens this is block-causal attention, and with a single chunk bidirectional attention.
    """
    mine, noisy, window_start = (
        q.chunk_index[..., :, None],
        q.noisy[..., :, None],
        q.window_start[..., :, None],
    )
    theirs = k.chunk_index[..., None, :]
    kept = (theirs >= window_start) | (theirs == q.sink[..., :, None])
    kept = kept | (theirs < q.global_sinks[..., :, None])
    clean = ((theirs < mine) & kept) | ((theirs == mine) & ~noisy)
    own = noisy & (theirs == mine)
    noisy_key = k.noisy[..., None, :]
    # Operators only, so that NumPy columns give a NumPy mask.
    return ((noisy_key & own) | (~noisy_key & clean)) & (theirs >= 0)


def visible_keys(q: Tokens, k: Tokens) -> Bool[Array, "*b k"]:
    """The single row of `visible` when the queries are alike."""
    if not q.uniform_mask:
        raise ValueError("queries differ in what they see; use visible()")
    first = Tokens(q.pos[..., :1, :], *(getattr(q, name)[..., :1] for name in COLUMNS))
    return visible(first, k)[..., 0, :]
