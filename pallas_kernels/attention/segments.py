"""Block sparsity without a mask, for tokens that are concrete at trace time.

Consecutive tokens with equal mask columns (the frames of a chunk, clean or noisy) form a run, and
all queries of a run attend to the same runs of keys. Attention therefore splits exactly into one
unmasked attention per run of queries, over slices of the keys. Teacher forcing of c chunks does
(c + 1) / 4c of the dense work, and implementations without masks (cuDNN) can be used.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.tokens import VISIBILITY_COLUMNS, Tokens, is_static, visible

MAX_SEGMENTS = 128
"""Maximum number of segments; each is traced and compiled separately. More need a mask.

Teacher forcing has two a chunk: 96 in 64 s, the longest clips of the paper. The compiled layer
grows with their number."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of queries and the key slices that all of them attend to.

    Attributes:
      start: first query.
      stop: end of the queries, exclusive.
      keys: (start, stop) of the visible key slices; empty if the queries are fully masked.
    """

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]


def segments(q: Tokens | None, k: Tokens | None) -> list[Segment] | None:
    """Splits queries into segments.

    Returns None if columns are traced or differ between samples, or if there would be more than
    `MAX_SEGMENTS`.
    """
    if q is None or k is None:
        return None
    q_rows, k_rows = _columns(q), _columns(k)
    if q_rows is None or k_rows is None:
        return None
    q_starts = _run_starts(q_rows)
    if len(q_starts) > MAX_SEGMENTS:
        return None
    k_starts = _run_starts(k_rows[:2])  # visibility of a key depends on chunk and noisy
    visible_runs = visible(_select_tokens(q_rows, q_starts), _select_tokens(k_rows, k_starts))
    q_stops = [*q_starts[1:], len(q)]
    k_stops = np.append(k_starts[1:], len(k))
    return [
        Segment(int(start), int(stop), _slices(k_starts[row], k_stops[row]))
        for start, stop, row in zip(q_starts, q_stops, visible_runs, strict=True)
    ]


def attend_segments(
    run: Callable[..., Any],
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    segment_list: list[Segment],
    *,
    lse: bool = False,
) -> Any:
    """Calls `run(q, k, v, None, None)` for every segment and concatenates the results.

    With `lse`, `run` returns a pair: the output and the log-sum-exp [b, q, n].
    """
    outputs = []
    for segment in segment_list:
        rows = q[:, segment.start : segment.stop]
        if segment.keys:
            keys, values = (take(x, segment.keys) for x in (k, v))
            outputs.append(run(rows, keys, values, None, None))
        else:
            zeros = jnp.zeros_like(rows, dtype=v.dtype)
            outputs.append((zeros, jnp.full(rows.shape[:3], -jnp.inf)) if lse else zeros)
    if len(outputs) == 1:
        return outputs[0]
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *outputs)


def _columns(tokens: Tokens) -> np.ndarray | None:
    """The columns that all samples share, [columns, l] int32; None if traced or different."""
    columns = [getattr(tokens, name) for name in VISIBILITY_COLUMNS]
    if not is_static(tokens):
        return None
    rows = np.stack([np.asarray(x, np.int32).reshape(-1, len(tokens)) for x in columns])
    return rows[:, 0] if (rows == rows[:, :1]).all() else None


def _run_starts(rows: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.append(True, (rows[:, 1:] != rows[:, :-1]).any(0)))


def _select_tokens(rows: np.ndarray, index: np.ndarray) -> Tokens:
    chunk, noisy, *rest = rows[:, index]
    pos: Any = np.zeros((len(index), 3), np.int32)
    return Tokens(pos, chunk, noisy.astype(bool), *rest)


def _slices(starts: np.ndarray, stops: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Runs as (start, stop) slices, adjacent ones merged."""
    merged: list[tuple[int, int]] = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))
    return tuple(merged)


def take(
    x: Float[Array, "b l n d"], slices: tuple[tuple[int, int], ...]
) -> Float[Array, "b k n d"]:
    """The rows of axis 1 in (start, stop) slices, one after the other."""
    if slices == ((0, x.shape[1]),):
        return x
    pieces = [x[:, start:stop] for start, stop in slices]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)
