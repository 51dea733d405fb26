"""Token layouts: by these alone the model is bidirectional, causal, teacher-forced or windowed.

Row and column counts are of tokens (2x2 latent patches). `start`, `shot_rope_offset` and `cuts` may
be traced; columns that depend on none of them are NumPy, so that attention can skip what is never
visible.
"""

import jax.numpy as jnp
import numpy as np

from longlive_jax.typing import Array, Bool, Int
from pallas_kernels.tokens import EMPTY, Tokens, concat, make

__all__ = [
    "Tokens",
    "concat",
    "grid",
    "shot_sinks",
    "teacher_forcing",
    "windowed",
    "windows",
]


def grid(
    frames: int,
    rows: int,
    columns: int,
    *,
    chunk_frames: int,
    start: int | Int[Array, ""] = 0,
    shot_rope_offset: Array | None = None,
    noisy: bool = False,
) -> Tokens:
    """Frames `start` to `start + frames` in chunks of `chunk_frames` frames, column fastest.

    One chunk is bidirectional attention; several clean ones are block-causal. `noisy` tokens see no
    noisy chunk but their own, which is what a chunk under denoising needs beside its cache.
    `shot_rope_offset` (`[frames]` or `[b, frames]`, in frames) is added to the temporal position
    and not to the chunk index (multi-shot RoPE). `start` is a multiple of `chunk_frames`.
    """
    if chunk_frames < 1 or frames < 1:
        raise ValueError(f"{frames} frames in chunks of {chunk_frames}; both must be at least 1")
    if isinstance(start, int | np.integer) and start % chunk_frames:
        raise ValueError(
            f"start {start} cuts a chunk of {chunk_frames} frames; begin at a multiple of it"
        )
    frame, *space = (x.reshape(-1).astype(np.int32) for x in np.mgrid[:frames, :rows, :columns])
    frame = frame + (np.int32(start) if isinstance(start, int | np.integer) else start)
    place = frame
    if shot_rope_offset is not None:
        place = frame + jnp.repeat(shot_rope_offset, rows * columns, axis=-1)
    xp = np if isinstance(place, np.ndarray) else jnp
    pos = xp.stack([place, *(xp.broadcast_to(x, place.shape) for x in space)], axis=-1)
    return make(pos, frame // chunk_frames, noisy, uniform_mask=frames <= chunk_frames)


def teacher_forcing(
    frames: int,
    rows: int,
    columns: int,
    *,
    chunk_frames: int,
    shot_rope_offset: Array | None = None,
) -> Tokens:
    """All clean frames, then the same frames noisy, at the same positions (paper, section 3.1)."""
    if frames % chunk_frames:
        raise ValueError(f"{frames} frames are no whole number of chunks of {chunk_frames}")
    parts = (
        grid(
            frames,
            rows,
            columns,
            chunk_frames=chunk_frames,
            shot_rope_offset=shot_rope_offset,
            noisy=noisy,
        )
        for noisy in (False, True)
    )
    return concat(*parts)


def shot_sinks(cuts: Bool[Array, "*b s"]) -> Int[Array, "*b s"]:
    """The shot sink of every chunk: the last chunk strictly before it that begins a shot, or -1.

    Chunk 0 begins a shot, cut or not. While the chunk at a cut is made, the sink of the shot before
    is still in force.
    """
    now = jnp.arange(cuts.shape[-1])
    marked = jnp.where(cuts | (now == 0), now, EMPTY)
    latest = jnp.maximum.accumulate(marked, axis=-1)
    before = jnp.concatenate([jnp.full_like(latest[..., :1], EMPTY), latest[..., :-1]], axis=-1)
    return before.astype(jnp.int32)


def windows(
    cuts: Bool[Array, "*b s"], *, window: int, global_sinks: int, shot_sink: bool = True
) -> tuple[Int[Array, "*b s"], Int[Array, "*b s"]]:
    """(`window_start`, `sink`) of every chunk for a budget of `window` chunks, its own included.

    Sinks lie inside the budget: what they do not take goes to the most recent chunks. The sets are
    those a cache of `window` chunks holds that overwrites its oldest unprotected slot.
    """
    least = 1 + max(1, global_sinks + shot_sink)
    if window < least:
        raise ValueError(
            f"a window of {window} chunks has no room for {global_sinks} global sinks"
            f"{' and a shot sink' if shot_sink else ''}; use at least {least}"
        )
    now = jnp.arange(cuts.shape[-1], dtype=jnp.int32)
    sink = shot_sinks(cuts) if shot_sink else jnp.full(cuts.shape, EMPTY, jnp.int32)
    recent = now - (window - 1 - global_sinks)
    # A sink that is neither recent nor global costs one of the recent chunks.
    apart = (sink >= global_sinks) & (sink < recent)
    return jnp.maximum(recent + apart, 0), sink


def windowed(
    tokens: Tokens,
    cuts: Bool[Array, "*b s"],
    *,
    window: int,
    global_sinks: int,
    shot_sink: bool = True,
) -> Tokens:
    """The same tokens, looking back only as far as `windows` says.

    `cuts` covers all chunks of the tokens; with a batch axis, so do the tokens returned.
    """
    window_start, sink = windows(
        cuts, window=window, global_sinks=global_sinks, shot_sink=shot_sink
    )
    if tokens.chunk_index.ndim > 1:
        raise ValueError("tokens already have a batch axis; give windowed() one sequence")
    window_start, sink = (x[..., tokens.chunk_index] for x in (window_start, sink))
    return make(
        tokens.pos,
        tokens.chunk_index,
        tokens.noisy,
        window_start=window_start,
        sink=sink,
        global_sinks=global_sinks,
        uniform_mask=tokens.uniform_mask,
    )
