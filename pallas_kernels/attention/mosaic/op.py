"""Block-sparse attention with its gradient, on the kernels of the chip at hand."""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.attention.mosaic.columns import MaskColumns, mask_columns
from pallas_kernels.attention.mosaic.parts import LOG2_E, MASKED, Saved
from pallas_kernels.attention.mosaic.targets import TARGETS, Target
from pallas_kernels.attention.tilemap import TileMap, at_once, known, pad_tokens, tile_map
from pallas_kernels.dispatch import Unsupported, capability, platform
from pallas_kernels.tokens import Tokens, make

WIDTHS = (64, 128)
"""Head widths that the kernels are compiled and tested for."""


@flax.struct.dataclass
class Mask:
    """All that the kernels know of a mask; made once for a layout and used in every layer."""

    columns: MaskColumns
    forward: TileMap  # query tiles over key tiles, for the output
    to_query: TileMap  # the same in the tiles of dq
    to_key: TileMap  # key tiles over query tiles, for dk and dv
    target: Target = flax.struct.field(pytree_node=False)


def mask_of(q_tokens: Tokens, k_tokens: Tokens, *, target: Target | None = None) -> Mask:
    """The mask of `visible` as columns and tile maps, for lengths padded to whole tiles.

    `target` is the chip at hand if None; raises `Unsupported` where that has no kernels.
    """
    target = target or _target_here()
    if not known(q_tokens, k_tokens):
        return _mask_of(q_tokens, k_tokens, target)
    with at_once():
        return _mask_of(q_tokens, k_tokens, target)


def _mask_of(q_tokens: Tokens, k_tokens: Tokens, target: Target) -> Mask:
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
    """Why these arguments cannot run here, or None."""
    if platform() != "gpu":
        return "it needs an NVIDIA GPU"
    if capability() not in TARGETS:
        known = " and ".join(f"{t.name} ({t.capability})" for t in TARGETS.values())
        return f"there are kernels for {known}, not for compute capability {capability() or '?'}"
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
) -> Float[Array, "b q n d"]:
    """The same as `reference.attend` for bfloat16 arguments, any length; float32 accumulation.

    Work is in proportion to the tiles that hold a visible pair, in both directions. The mask is
    made anew at every call; `mask_of` and `attend_mask` share one between calls.
    """
    return attend_with_lse(q, k, v, q_tokens, k_tokens)[0]


def attend_with_lse(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
) -> tuple[Float[Array, "b q n d"], Float[Array, "b q n"]]:
    """`attend`, and what `reference.attend_with_lse` gives beside it."""
    if q_tokens is None or k_tokens is None:
        q_tokens, k_tokens = (one_chunk(x.shape[1]) for x in (q, k))
    return attend_mask(q, k, v, mask_of(q_tokens, k_tokens))


def attend_mask(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    mask: Mask,
    *,
    interpret: Any = None,
) -> tuple[Float[Array, "b q n d"], Float[Array, "b q n"]]:
    """Output and natural log-sum-exp of the scaled logits, float32, -inf where nothing is seen.

    Both are differentiable. `interpret` (`plgpu.InterpretGPUParams`) simulates the kernels.
    """
    length = q.shape[1]
    q, k, v = (_padded(x, mask.target.rows) for x in (q, k, v))
    out, lse = _attend(q, k, v, mask, interpret)
    lse = jnp.where(lse >= -MASKED, -jnp.inf, lse * math.log(2))
    return out[:, :length], jnp.swapaxes(lse[..., :length], 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, mask: Mask, interpret):
    target = mask.target
    tiles = target.forward_tiles
    return target.forward(q, k, v, mask.columns, mask.forward, tiles, interpret=interpret)


def _attend_forward(q, k, v, mask: Mask, interpret):
    out, lse = _attend(q, k, v, mask, interpret)
    return (out, lse), (q, k, v, mask, out, lse)


def _attend_backward(interpret, kept, grads):
    q, k, v, mask, out, lse = kept
    grad, to_lse = grads
    delta = jnp.einsum("bqnd,bqnd->bnq", grad, out, preferred_element_type=jnp.float32)
    # d lse / d logits are the weights, which the kernels multiply by (grad v) - delta.
    delta = delta - to_lse * LOG2_E
    saved = Saved(q, k, v, grad, lse, delta, mask.columns)
    target = mask.target
    tiles = target.backward_tiles
    dq = target.query_gradient(saved, mask.to_query, tiles, interpret=interpret)
    dk, dv = target.key_value_gradient(saved, mask.to_key, tiles, interpret=interpret)
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)


def _target_here() -> Target:
    if capability() not in TARGETS:
        raise Unsupported(f"no attention kernels for compute capability {capability() or '?'}")
    return TARGETS[capability()]


def _padded(x: Array, size: int) -> Array:
    rest = -x.shape[1] % size
    return jnp.pad(x, ((0, 0), (0, rest), (0, 0), (0, 0))) if rest else x


def one_chunk(length: int) -> Tokens:
    """Tokens that all see each other."""
    return make(np.zeros((length, 3), np.int32), 0, False)
