"""Block-sparse attention and its gradient, on the kernels of the current device."""

import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import tuned
from pallas_kernels.attention.mosaic.columns import MaskColumns, mask_columns
from pallas_kernels.attention.mosaic.primitives import LOG2_E, MASKED, BackwardInputs
from pallas_kernels.attention.mosaic.targets import Target
from pallas_kernels.attention.saved import name_saved
from pallas_kernels.attention.tilemap import (
    TileMap,
    concrete_evaluation,
    is_concrete,
    pad_tokens,
    tile_map,
)
from pallas_kernels.dispatch import (
    capability,
    device_kind,
    kernel_of,
    kernel_refusal,
    platform,
)
from pallas_kernels.tokens import EMPTY, Tokens, make

WIDTHS = (64, 128)
"""Head widths for which the kernels are compiled and tested."""


@flax.struct.dataclass
class Mask:
    """A mask in the form that the kernels read; built once for fixed tokens, used in every layer.

    Attributes:
      columns: mask columns of queries and keys.
      forward: map of query tiles over key tiles, for the output.
      query_gradient: map of query tiles over key tiles, in the tile sizes of dq.
      key_value_gradient: map of key tiles over query tiles, for dk and dv.
      target: chip whose tile sizes the maps have.
      empty_queries: where query rows are padding [b, q]; None if none is, or if tokens are traced.
      empty_keys: the same for key rows.
    """

    columns: MaskColumns
    forward: TileMap
    query_gradient: TileMap
    key_value_gradient: TileMap
    target: Target = flax.struct.field(pytree_node=False)
    empty_queries: Array | None = None
    empty_keys: Array | None = None


def make_mask(q_tokens: Tokens, k_tokens: Tokens, *, target: Target | None = None) -> Mask:
    """Builds the mask columns and tile maps of `visible`, for lengths padded to whole tiles.

    `target` None means the current device. Raises `Unsupported` if it has no kernels.
    """
    target = target or _current_target()
    if not is_concrete(q_tokens, k_tokens):
        return _make_mask(q_tokens, k_tokens, target)
    with concrete_evaluation():
        mask = _make_mask(q_tokens, k_tokens, target)
        return dataclasses.replace(
            mask, empty_queries=_empty(q_tokens), empty_keys=_empty(k_tokens)
        )


def _empty(tokens: Tokens) -> Array | None:
    rows = np.atleast_2d(np.asarray(tokens.chunk_index)) == EMPTY
    return jnp.asarray(rows) if rows.any() else None


def _make_mask(q_tokens: Tokens, k_tokens: Tokens, target: Target) -> Mask:
    q, k = (pad_tokens(tokens, target.rows) for tokens in (q_tokens, k_tokens))
    forward, backward = target.forward_tiles, target.backward_tiles

    @functools.cache  # dq often has the tiles of the forward pass
    def by_query(q_tile: int, k_tile: int) -> TileMap:
        return tile_map(q, k, q_tile=q_tile, k_tile=k_tile, rows="query")

    return Mask(
        mask_columns(q, k),
        by_query(forward.rows, forward.keys),
        by_query(backward.rows, backward.step),
        tile_map(q, k, q_tile=backward.step, k_tile=backward.rows, rows="key"),
        target,
    )


def refusal(q: Array | jax.ShapeDtypeStruct) -> str | None:
    """The reason why these arguments cannot run on the current device, or None."""
    if platform() != "gpu":
        return "it needs an NVIDIA GPU"
    return kernel_refusal("attention", capability(), q)


def unsupported(q: Array | jax.ShapeDtypeStruct, *rest: Any) -> str | None:
    """The reason why the kernels cannot run these arguments on any chip, or None."""
    if jnp.dtype(q.dtype) != jnp.bfloat16:
        return f"arguments must be bfloat16, got {jnp.dtype(q.dtype)}"
    if q.shape[-1] not in WIDTHS:
        return f"the head width must be {' or '.join(map(str, WIDTHS))}, got {q.shape[-1]}"
    return None


def attend(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
) -> Float[Array, "b q n d"]:
    """`reference.attend` for bfloat16 arguments of any length, with float32 accumulation.

    The work is proportional to the number of tiles with a visible pair, in the forward and the
    backward pass. The mask is rebuilt at every call; `make_mask` and `attend_mask` reuse one.
    """
    return attend_with_lse(q, k, v, q_tokens, k_tokens)[0]


def attend_with_lse(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
) -> tuple[Float[Array, "b q n d"], Float[Array, "b q n"]]:
    """`attend` and the log-sum-exp of `reference.attend_with_lse`."""
    if q_tokens is None or k_tokens is None:
        q_tokens, k_tokens = (single_chunk_tokens(x.shape[1]) for x in (q, k))
    return attend_mask(q, k, v, make_mask(q_tokens, k_tokens))


def attend_mask(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    mask: Mask,
    *,
    interpret: Any = None,
) -> tuple[Float[Array, "b q n d"], Float[Array, "b q n"]]:
    """Output, and natural log-sum-exp of the scaled logits in float32.

    The log-sum-exp is -inf for fully masked queries. Both are differentiable. `interpret`
    (`plgpu.InterpretGPUParams`) runs the kernels in the interpreter. Padding rows of concrete
    tokens may hold NaN; with traced tokens they must be finite, as they are multiplied by zeros.
    """
    length = q.shape[1]
    q = _without(q, mask.empty_queries)
    k, v = (_without(x, mask.empty_keys) for x in (k, v))
    q, k, v = (_padded(x, mask.target.rows) for x in (q, k, v))
    out, lse = _attend(q, k, v, mask, interpret)
    lse = jnp.where(lse >= -MASKED, -jnp.inf, lse * math.log(2))
    # The zeros are there already; this stops gradients of padding, which may be NaN.
    out, lse = _without(out[:, :length], mask.empty_queries), jnp.swapaxes(lse[..., :length], 1, 2)
    empty = mask.empty_queries
    return out, lse if empty is None else jnp.where(empty[..., None], -jnp.inf, lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, mask: Mask, interpret):
    target = mask.target
    tiles = target.forward_tiles
    return target.forward(q, k, v, mask.columns, mask.forward, tiles, interpret=interpret)


def _attend_forward(q, k, v, mask: Mask, interpret):
    out, lse = name_saved(*_attend(q, k, v, mask, interpret))
    return (out, lse), (q, k, v, mask, out, lse)


def _attend_backward(interpret, residuals, grads):
    q, k, v, mask, out, lse = residuals
    grad, d_lse = grads
    delta = jnp.einsum("bqnd,bqnd->bnq", grad, out, preferred_element_type=jnp.float32)
    # d lse / d logits are the weights, and the kernels multiply the weights by grad v - delta.
    delta = delta - d_lse * LOG2_E
    saved = BackwardInputs(q, k, v, grad, lse, delta, mask.columns)
    target = mask.target
    tiles = target.backward_tiles
    dq = target.query_gradient(saved, mask.query_gradient, tiles, interpret=interpret)
    dk, dv = target.key_value_gradient(saved, mask.key_value_gradient, tiles, interpret=interpret)
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)


def _current_target() -> Target:
    return with_tuned_tiles(kernel_of("attention").target, device_kind())


def with_tuned_tiles(target: Target, device: str) -> Target:
    """`target` with the tile sizes that were found on a kind of device, if any were."""
    chip = target.name.lower()
    forward, backward = (
        tuned.tiles(f"attention_{part}_{chip}", device) for part in ("forward", "gradients")
    )
    if not (forward or backward):
        return target
    return dataclasses.replace(
        target,
        forward_tiles=dataclasses.replace(target.forward_tiles, **forward),
        backward_tiles=dataclasses.replace(target.backward_tiles, **backward),
    )


def _without(x: Array, rows: Array | None) -> Array:
    """x with zeros in the given rows."""
    return x if rows is None else jnp.where(rows[..., None, None], 0, x)


def _padded(x: Array, size: int) -> Array:
    rest = -x.shape[1] % size
    return jnp.pad(x, ((0, 0), (0, rest), (0, 0), (0, 0))) if rest else x


def single_chunk_tokens(length: int) -> Tokens:
    """Tokens of a single chunk, which all attend to each other."""
    return make(np.zeros((length, 3), np.int32), 0, False)
