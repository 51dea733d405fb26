"""Token layouts, which alone make the model bidirectional, causal, teacher-forced or windowed.

Rows and columns count tokens (2x2 latent patches). `start`, `shot_rope_offset` and `cuts` may be
traced. Token attributes that depend on none of them are NumPy arrays, so that attention can skip
tiles that are never visible.
"""

import jax.numpy as jnp
import numpy as np

from longlive_jax.typing import Array, Bool, Int
from pallas_kernels.tokens import EMPTY, Tokens, concat, make

__all__ = [
    "Tokens",
    "concat",
    "full_history",
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
    """Tokens of frames [start, start + frames) in chunks of `chunk_frames`, columns fastest.

    A single chunk gives bidirectional attention, several clean chunks block-causal attention.
    `noisy` tokens attend to no noisy chunk but their own, as a chunk being denoised needs in
    addition to its KV cache.

    Args:
      frames: number of latent frames.
      rows: token rows per frame.
      columns: token columns per frame.
      chunk_frames: frames per chunk.
      start: index of the first frame, a multiple of `chunk_frames`.
      shot_rope_offset: [frames] or [b, frames], in frames; added to the temporal RoPE position but
        not to the chunk index (multi-shot RoPE).
      noisy: whether the tokens are noisy.

    Raises:
      ValueError: `frames` or `chunk_frames` is below 1, or `start` is inside a chunk.
    """
    if chunk_frames < 1 or frames < 1:
        raise ValueError(f"frames and chunk_frames must be >= 1, got {frames} and {chunk_frames}")
    if isinstance(start, int | np.integer) and start % chunk_frames:
        raise ValueError(
            f"start {start} is inside a chunk of {chunk_frames} frames; begin at a multiple of it"
        )
    frame, *space = (x.reshape(-1).astype(np.int32) for x in np.mgrid[:frames, :rows, :columns])
    frame = frame + (np.int32(start) if isinstance(start, int | np.integer) else start)
    time = frame
    if shot_rope_offset is not None:
        time = frame + jnp.repeat(shot_rope_offset, rows * columns, axis=-1)
    xp = np if isinstance(time, np.ndarray) else jnp
    pos = xp.stack([time, *(xp.broadcast_to(x, time.shape) for x in space)], axis=-1)
    return make(pos, frame // chunk_frames, noisy, uniform_mask=frames <= chunk_frames)


def teacher_forcing(
    frames: int,
    rows: int,
    columns: int,
    *,
    chunk_frames: int,
    shot_rope_offset: Array | None = None,
) -> Tokens:
    """Clean tokens of all frames, then noisy tokens of the same frames (paper, section 3.1).

    Clean and noisy tokens of a frame have equal positions. The arguments are those of `grid`.
    Raises ValueError if `chunk_frames` does not divide `frames`.
    """
    if frames % chunk_frames:
        raise ValueError(f"{frames} frames are not a multiple of chunk_frames = {chunk_frames}")
    halves = (
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
    return concat(*halves)


def full_history(chunks: int) -> dict[str, np.ndarray]:
    """Mask columns [chunks], int32, of a clip in which every chunk attends to its whole past.

    They are the same for all clips of a length, so that the mask of a batch is known when tracing.
    """
    return {
        "chunk_index": np.arange(chunks, dtype=np.int32),
        "window_start": np.zeros(chunks, np.int32),
        "sink": np.full(chunks, EMPTY, np.int32),
    }


def shot_sinks(cuts: Bool[Array, "*b s"]) -> Int[Array, "*b s"]:
    """The shot sink of each chunk: the last earlier chunk that begins a shot, or -1.

    Chunk 0 always begins a shot. The chunk at a cut still uses the sink of the previous shot.
    """
    now = jnp.arange(cuts.shape[-1])
    marked = jnp.where(cuts | (now == 0), now, EMPTY)
    latest = jnp.maximum.accumulate(marked, axis=-1)
    before = jnp.concatenate([jnp.full_like(latest[..., :1], EMPTY), latest[..., :-1]], axis=-1)
    return before.astype(jnp.int32)


def windows(
    cuts: Bool[Array, "*b s"], *, window: int, global_sinks: int, shot_sink: bool = True
) -> tuple[Int[Array, "*b s"], Int[Array, "*b s"]]:
    """(`window_start`, `sink`) of each chunk, for a budget of `window` chunks including itself.

    Sinks count towards the budget, and the most recent chunks get the rest. The visible chunks are
    those in a KV cache of `window` chunks that overwrites its oldest unprotected slot. Raises
    ValueError if the window is too small for the sinks.
    """
    minimum = 1 + max(1, global_sinks + shot_sink)
    if window < minimum:
        raise ValueError(
            f"window must be >= {minimum} chunks for {global_sinks} global sinks"
            f"{' and a shot sink' if shot_sink else ''}, got {window}"
        )
    now = jnp.arange(cuts.shape[-1], dtype=jnp.int32)
    sink = shot_sinks(cuts) if shot_sink else jnp.full(cuts.shape, EMPTY, jnp.int32)
    recent = now - (window - 1 - global_sinks)
    # A sink that is neither recent nor global takes the slot of one recent chunk.
    takes_slot = (sink >= global_sinks) & (sink < recent)
    return jnp.maximum(recent + takes_slot, 0), sink


def windowed(
    tokens: Tokens,
    cuts: Bool[Array, "*b s"],
    *,
    window: int,
    global_sinks: int,
    shot_sink: bool = True,
) -> Tokens:
    """The same tokens with attention limited to the windows that `windows` computes.

    `cuts` covers all chunks of the tokens. If it has a batch axis, so have the returned tokens.
    Raises ValueError if `tokens` already have a batch axis.
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
