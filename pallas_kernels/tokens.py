"""What each token is. Which keys a query may see, and where RoPE puts it, follow from this alone.

A mode of attention (bidirectional, block-causal, teacher-forced, cached, windowed with sinks) is
not an argument but a set of columns; `visible` is the whole contract that an implementation keeps.
"""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Real

EMPTY = -1
"""The chunk of a cache slot or padding token that holds nothing."""


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
    """Tokens from columns or scalars; everything is broadcast to the shape of `pos[..., 0]`."""
    pos = jnp.asarray(pos)
    columns = (jnp.asarray(x, jnp.int32) for x in (chunk, since, sink, global_sinks))
    batch = jnp.broadcast_shapes(pos.shape[:-1], jnp.shape(chunk), jnp.shape(noisy))
    chunk, since, sink, global_sinks = (jnp.broadcast_to(x, batch) for x in columns)
    noisy = jnp.broadcast_to(jnp.asarray(noisy, bool), batch)
    pos = jnp.broadcast_to(pos, (*batch, 3))
    return Tokens(pos, chunk, noisy, since, sink, global_sinks, alike=alike)


def concat(*parts: Tokens) -> Tokens:
    """One sequence after the other; batch axes are broadcast."""
    batch = jnp.broadcast_shapes(*(part.chunk.shape[:-1] for part in parts))

    def join(own: int, *columns: Array) -> Array:
        wide = [jnp.broadcast_to(x, (*batch, *x.shape[-own:])) for x in columns]
        return jnp.concatenate(wide, axis=len(batch))

    pos = join(2, *(part.pos for part in parts))
    names = ("chunk", "noisy", "since", "sink", "global_sinks")
    columns = (join(1, *(getattr(part, name) for part in parts)) for name in names)
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
    kept |= theirs < q.global_sinks[..., :, None]
    clean = ((theirs < mine) & kept) | ((theirs == mine) & ~noisy)
    return jnp.where(k.noisy[..., None, :], noisy & (theirs == mine), clean) & (theirs >= 0)


def visible_keys(q: Tokens, k: Tokens) -> Bool[Array, "*b k"]:
    """The single row of `visible` when the queries are alike."""
    if not q.alike:
        raise ValueError("queries differ in what they see; use visible()")
    first = Tokens(
        q.pos[..., :1, :],
        *(x[..., :1] for x in (q.chunk, q.noisy, q.since, q.sink, q.global_sinks)),
    )
    return visible(first, k)[..., 0, :]
