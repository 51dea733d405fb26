"""Block-sparse attention with its gradient, on the Hopper kernels."""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.mosaic.columns import MaskColumns, mask_columns
from pallas_kernels.attention.mosaic.hopper_backward import (
    BackwardTiles,
    Saved,
    key_value_gradient,
    query_gradient,
)
from pallas_kernels.attention.mosaic.hopper_forward import MASKED, ForwardTiles, forward
from pallas_kernels.attention.tilemap import TileMap, pad_tokens, tile_maps
from pallas_kernels.dispatch import platform
from pallas_kernels.tokens import Tokens, make

FORWARD = ForwardTiles()
BACKWARD = BackwardTiles()
WIDTHS = (64, 128)
"""Head widths that the kernels are compiled and tested for."""


@flax.struct.dataclass
class Layout:
    """All that the kernels know of a mask; made once for a layout and used in every layer."""

    columns: MaskColumns
    forward: TileMap  # query tiles over key tiles, for the output
    to_query: TileMap  # the same with smaller key tiles, for dq
    to_key: TileMap  # key tiles over query tiles, for dk and dv


def layout(q_tokens: Tokens, k_tokens: Tokens) -> Layout:
    """The mask of `visible` as columns and tile maps, for lengths padded to whole tiles."""
    q, k = pad_tokens(q_tokens, FORWARD.rows), pad_tokens(k_tokens, BACKWARD.rows)
    step = BACKWARD.step
    return Layout(
        mask_columns(q, k),
        tile_maps(q, k, q_tile=FORWARD.rows, k_tile=FORWARD.keys)[0],
        tile_maps(q, k, q_tile=BACKWARD.rows, k_tile=step)[0],
        tile_maps(q, k, q_tile=step, k_tile=BACKWARD.rows)[1],
    )


def refusal(q: Array | jax.ShapeDtypeStruct) -> str | None:
    """Why these arguments cannot run here, or None."""
    if platform() != "gpu":
        return "it needs an NVIDIA GPU"
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    if capability != "9.0":
        return f"the kernels are for Hopper (compute capability 9.0), not {capability or '?'}"
    if jnp.dtype(q.dtype) != jnp.bfloat16:
        return f"it takes bfloat16 arguments, not {jnp.dtype(q.dtype)}"
    if q.shape[-1] not in WIDTHS:
        return f"heads are {q.shape[-1]} wide; it takes {' or '.join(map(str, WIDTHS))}"
    return None


def attend(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
    *,
    interpret: Any = None,
) -> Float[Array, "b q n d"]:
    """The same as `reference.attend` for bfloat16 arguments, any length; float32 accumulation.

    Work is in proportion to the tiles that hold a visible pair, in both directions.
    """
    if q_tokens is None or k_tokens is None:
        q_tokens, k_tokens = (_one_chunk(x.shape[1]) for x in (q, k))
    return attend_layout(q, k, v, layout(q_tokens, k_tokens), interpret=interpret)[0]


def attend_layout(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    mask: Layout,
    *,
    interpret: Any = None,
) -> tuple[Float[Array, "b q n d"], Float[Array, "b n q"]]:
    """Output and natural log-sum-exp of the scaled logits, float32, -inf where nothing is seen.

    No gradient flows through the log-sum-exp.
    """
    length = q.shape[1]
    q, k, v = _padded(q, FORWARD.rows), *(_padded(x, BACKWARD.rows) for x in (k, v))
    out, lse = _attend(q, k, v, mask, interpret)
    lse = jnp.where(lse >= -MASKED, -jnp.inf, lse * math.log(2))
    return out[:, :length], jax.lax.stop_gradient(lse[..., :length])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, mask: Layout, interpret):
    return forward(q, k, v, mask.columns, mask.forward, FORWARD, interpret=interpret)


def _attend_forward(q, k, v, mask: Layout, interpret):
    out, lse = _attend(q, k, v, mask, interpret)
    return (out, lse), (q, k, v, mask, out, lse)


def _attend_backward(interpret, kept, grads):
    q, k, v, mask, out, lse = kept
    grad = grads[0]
    delta = jnp.einsum("bqnd,bqnd->bnq", grad, out, preferred_element_type=jnp.float32)
    saved = Saved(q, k, v, grad, lse, delta, mask.columns)
    dq = query_gradient(saved, mask.to_query, BACKWARD, interpret=interpret)
    dk, dv = key_value_gradient(saved, mask.to_key, BACKWARD, interpret=interpret)
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)


def _padded(x: Array, size: int) -> Array:
    rest = -x.shape[1] % size
    return jnp.pad(x, ((0, 0), (0, rest), (0, 0), (0, 0))) if rest else x


def _one_chunk(length: int) -> Tokens:
    """Tokens that all see each other."""
    return make(jnp.zeros((length, 3), jnp.int32), 0, False)
