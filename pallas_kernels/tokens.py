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

COLUMNS = ("chunk", "noisy", "since", "sink", "global_sinks")
"""What `visible` reads, one value a token."""


@flax.struct.dataclass
class Tokens:
    """Columns of a token sequence; every one may have a leading batch axis.

    `since`, `sink` and `global_sinks` are read from queries only, and limit how far back they look:
    a past chunk is kept if it is at least `since`, or equals `sink`, or is below `global_sinks`.
    """

    pos: Real[Array, "*b l 3"]
    """Frame, row and column for RoPE; frames may be fractional."""
    chunk: Int[Array, "*b l"]
    """Index of the chunk, counted from the start of the video; `EMPTY` is seen by nobody."""
    noisy: Bool[Array, "*b l"]
    """Being denoised; otherwise clean context."""
    since: Int[Array, "*b l"]
    """The oldest chunk of the window; 0 is all of the past."""
    sink: Int[Array, "*b l"]
    """One more chunk that stays visible (the shot sink), or `EMPTY`."""
    global_sinks: Int[Array, "*b l"]
    """So many first chunks stay visible."""
    alike: bool = flax.struct.field(pytree_node=False, default=False)
    """All tokens of a sample see the same keys (they are of one chunk, all noisy or all clean), so
    that the mask is one row a sample. Known while tracing; lets implementations skip the mask."""

    def __len__(self) -> int:
        return self.chunk.shape[-1]


def make(pos, chunk, noisy, *, since=0, sink=EMPTY, global_sinks=0, alike: bool = False) -> Tokens:
    """Tokens from columns or scalars; everything is broadcast to the shape of `pos[..., 0]`.

    Columns given as NumPy arrays or Python numbers stay NumPy: attention then knows the mask while
    it traces, and does no work for pairs that are never visible.
    """
    shapes = (pos.shape[:-1], *(np.shape(x) for x in (chunk, noisy, since, sink, global_sinks)))
    batch = np.broadcast_shapes(*shapes)
    columns = (_column(x, batch, np.int32) for x in (chunk, since, sink, global_sinks))
    chunk, since, sink, global_sinks = columns
    pos = _namespace(pos).broadcast_to(pos, (*batch, 3))
    return Tokens(pos, chunk, _column(noisy, batch, np.bool_), since, sink, global_sinks, alike)


def _namespace(*arrays):
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


def _column(x, shape: tuple[int, ...], dtype) -> Array:
    xp = _namespace(x)
    return xp.broadcast_to(xp.asarray(x, dtype), shape)


def concat(*parts: Tokens) -> Tokens:
    """One sequence after the other; batch axes are broadcast."""
    batch = np.broadcast_shapes(*(part.chunk.shape[:-1] for part in parts))

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
    mine, noisy, since = q.chunk[..., :, None], q.noisy[..., :, None], q.since[..., :, None]
    theirs = k.chunk[..., None, :]
    kept = (theirs >= since) | (theirs == q.sink[..., :, None])
    kept = kept | (theirs < q.global_sinks[..., :, None])
    clean = ((theirs < mine) & kept) | ((theirs == mine) & ~noisy)
    own = noisy & (theirs == mine)
    noisy_key = k.noisy[..., None, :]
    # Operators only, so that NumPy columns give a NumPy mask.
    return ((noisy_key & own) | (~noisy_key & clean)) & (theirs >= 0)


def visible_keys(q: Tokens, k: Tokens) -> Bool[Array, "*b k"]:
    """The single row of `visible` when the queries are alike."""
    if not q.alike:
        raise ValueError("queries differ in what they see; use visible()")
    first = Tokens(q.pos[..., :1, :], *(getattr(q, name)[..., :1] for name in COLUMNS))
    return visible(first, k)[..., 0, :]
