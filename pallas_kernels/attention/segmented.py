"""Masked attention by a fused kernel that has no mask: one call for every shape of `segments`.

Segments with equally many queries and keys run as one batch. In teacher forcing these are the clean
and the noisy queries of a chunk, so that c chunks need c calls. The gradient saves what a single
call would save (q, k, v, output, log-sum-exp) and no slices; it slices again, and adds up the
gradients of keys and values in float32.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.attention.saved import name_saved
from pallas_kernels.attention.segments import Segment, take

Slices = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class FusedKernel:
    """Attention without a mask, and its gradient.

    Attributes:
      forward: (q, k, v) -> output [b, q, n, d], float32 log-sum-exp [b, n, q].
      backward: (q, k, v, output, log-sum-exp, gradient of the output) -> gradients of q, k and v.
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Segments of one shape, which run as one call.

    Attributes:
      queries: slice of the queries of every segment.
      keys: slices of the keys of every segment.
    """

    queries: Slices
    keys: tuple[Slices, ...]


def batches(segments: Sequence[Segment]) -> list[Batch]:
    """Segments grouped by their numbers of queries and keys; fully masked ones are left out."""
    groups: dict[tuple[int, int], list[Segment]] = {}
    for segment in segments:
        if segment.keys:
            shape = segment.stop - segment.start, sum(stop - start for start, stop in segment.keys)
            groups.setdefault(shape, []).append(segment)
    return [
        Batch(tuple((x.start, x.stop) for x in group), tuple(x.keys for x in group))
        for group in groups.values()
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend_batched(
    kernel: FusedKernel,
    segments: tuple[Segment, ...],
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
) -> Float[Array, "b q n d"]:
    """Attention of every segment to its keys; zeros for fully masked queries.

    Reverse mode only. Under rematerialization, `saved.SAVED` names what the gradient needs.
    """
    return _attend(kernel, segments, q, k, v)[0]


def _attend(kernel, segments, q, k, v) -> tuple[Array, Array]:
    """Output, and log-sum-exp [b, n, q], which is 0 for fully masked queries."""
    b, _, n, _ = q.shape
    pieces: dict[int, tuple[Array, Array]] = {}
    for batch in batches(segments):
        out, lse = kernel.forward(*_operands(batch, q, k, v))
        q, k, v, out, lse = _in_turn(q, k, v, out, lse)
        for i, (start, _) in enumerate(batch.queries):
            pieces[start] = out[i * b : (i + 1) * b], lse[i * b : (i + 1) * b]
    for segment in segments:
        if not segment.keys:
            rows = q[:, segment.start : segment.stop]
            pieces[segment.start] = jnp.zeros_like(rows), jnp.zeros((b, n, rows.shape[1]))
    ordered = [pieces[start] for start in sorted(pieces)]
    if len(ordered) == 1:
        return ordered[0]
    out, lse = zip(*ordered, strict=True)
    return jnp.concatenate(out, axis=1), jnp.concatenate(lse, axis=2)


def _attend_forward(kernel, segments, q, k, v):
    out, lse = name_saved(*_attend(kernel, segments, q, k, v))
    return out, (q, k, v, out, lse)


def _attend_backward(kernel, segments, saved, d_out):
    q, k, v, out, lse = saved
    b = q.shape[0]
    d_q = jnp.zeros_like(q)
    d_k, d_v = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    for batch in batches(segments):
        # 1. Gradients of this batch.
        rows = [_stack([take(x, (piece,)) for piece in batch.queries]) for x in (out, d_out)]
        lses = _stack([lse[:, :, start:stop] for start, stop in batch.queries])
        grads = kernel.backward(*_operands(batch, q, k, v), rows[0], lses, rows[1])
        # 2. Every query is in one segment; keys add up over segments.
        for i, (start, stop) in enumerate(batch.queries):
            own = [x[i * b : (i + 1) * b] for x in grads]
            d_q = d_q.at[:, start:stop].set(own[0])
            d_k, d_v = (
                _add_slices(total, part, batch.keys[i])
                for total, part in zip((d_k, d_v), own[1:], strict=True)
            )
        q, k, v, out, lse, d_out, d_q, d_k, d_v = _in_turn(q, k, v, out, lse, d_out, d_q, d_k, d_v)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)


attend_batched.defvjp(_attend_forward, _attend_backward)


def _operands(batch: Batch, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """q, k and v of all segments of a batch, one after the other along axis 0."""
    rows = _stack([take(q, (piece,)) for piece in batch.queries])
    keys, values = (_stack([take(x, slices) for slices in batch.keys]) for x in (k, v))
    return rows, keys, values


def _in_turn(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, after which the next batch begins: the slices of all batches together would be
    many times the size of keys and values."""
    return lax.optimization_barrier(arrays)


def _stack(pieces: list[Array]) -> Array:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=0)


def _add_slices(total: Array, part: Array, slices: Slices) -> Array:
    """`total` with consecutive pieces of `part` added at `slices` of axis 1."""
    offset = 0
    for start, stop in slices:
        piece = part[:, offset : offset + stop - start]
        total = total.at[:, start:stop].add(piece.astype(total.dtype))
        offset += stop - start
    return total
