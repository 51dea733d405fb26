"""Block sparsity without a mask, for token columns that are known while tracing.

Tokens come in runs (the frames of a chunk, clean or noisy), and all tokens of a run see the same
runs. So attention splits exactly into one unmasked attention a run of queries over the slices of
keys it sees: teacher forcing of c chunks does (c + 1) / 4c of the dense work, and implementations
that know no masks (cuDNN) serve.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.tokens import COLUMNS, Tokens, visible

MOST = 64
"""More runs of queries than this are left to a mask: every one is traced and compiled apart."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Queries `start:stop`, and the slices of keys all of them see (none: zeros)."""

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]


def segments(q: Tokens | None, k: Tokens | None) -> list[Segment] | None:
    """The runs of queries; None if columns are traced, differ between samples or make too many."""
    if q is None or k is None:
        return None
    q_rows, k_rows = _columns(q), _columns(k)
    if q_rows is None or k_rows is None:
        return None
    q_starts = _run_starts(q_rows)
    if len(q_starts) > MOST:
        return None
    k_starts = _run_starts(k_rows[:2])  # visibility of a key depends on chunk and noisy
    seen = visible(_at(q_rows, q_starts), _at(k_rows, k_starts))
    q_stops = [*q_starts[1:], len(q)]
    k_stops = np.append(k_starts[1:], len(k))
    return [
        Segment(int(start), int(stop), _slices(k_starts[row], k_stops[row]))
        for start, stop, row in zip(q_starts, q_stops, seen, strict=True)
    ]


def by_segments(
    run: Callable[..., Any],
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    parts: list[Segment],
    *,
    lse: bool = False,
) -> Any:
    """`run(q, k, v, None, None)` for every segment, joined in order.

    With `lse`, `run` gives a pair: the output and the log-sum-exp [b, q, n].
    """
    found = []
    for part in parts:
        rows = q[:, part.start : part.stop]
        if part.keys:
            keys, values = (_take(x, part.keys) for x in (k, v))
            found.append(run(rows, keys, values, None, None))
        else:
            zeros = jnp.zeros_like(rows, dtype=v.dtype)
            found.append((zeros, jnp.full(rows.shape[:3], -jnp.inf)) if lse else zeros)
    if len(found) == 1:
        return found[0]
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *found)


def _columns(tokens: Tokens) -> np.ndarray | None:
    """[columns, l] int32 of the one sample that stands for all, or None."""
    columns = [getattr(tokens, name) for name in COLUMNS]
    if any(isinstance(x, jax.Array) for x in columns):
        return None
    rows = np.stack([np.asarray(x, np.int32).reshape(-1, len(tokens)) for x in columns])
    return rows[:, 0] if (rows == rows[:, :1]).all() else None


def _run_starts(rows: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.append(True, (rows[:, 1:] != rows[:, :-1]).any(0)))


def _at(rows: np.ndarray, index: np.ndarray) -> Tokens:
    chunk, noisy, *rest = rows[:, index]
    pos: Any = np.zeros((len(index), 3), np.int32)
    return Tokens(pos, chunk, noisy.astype(bool), *rest)


def _slices(starts: np.ndarray, stops: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Runs as (start, stop), neighbours merged."""
    merged: list[tuple[int, int]] = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))
    return tuple(merged)


def _take(x: Array, slices: tuple[tuple[int, int], ...]) -> Array:
    if slices == ((0, x.shape[1]),):
        return x
    pieces = [x[:, start:stop] for start, stop in slices]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)
