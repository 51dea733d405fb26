"""XLA's custom calls for cuDNN's fused attention, forward and backward.

`jax.nn.dot_product_attention` rounds the log-sum-exp to the dtype of the queries and has no
backward call of its own. Attention over several sets of keys needs both: the float32 log-sum-exp,
and gradients from a saved output and log-sum-exp. The calls are those of `jax.nn` (a test compares
the programs), so their contract is that of XLA.
"""

import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_TYPES = {"bfloat16": "BF16", "float16": "F16"}

_SETTINGS = {
    "algorithm": {
        "algo_id": "0",
        "math_type": "TENSOR_OP_MATH",
        "tuning_knobs": {"17": "1", "24": "0"},
        "is_cudnn_frontend": True,
        "workspace_size": "0",
    },
    "is_flash_attention": True,
    "dropout_rate": 0.0,
    "seed": 42,
    "sliding_window_length": 0,
    "max_seg_per_batch": 1,
    "is_paged_attention": False,
}
"""What all calls have in common."""

_Axes = tuple[int, int]

_FORWARD_PRODUCTS: dict[str, tuple[_Axes, _Axes, _Axes]] = {
    "bmm1": ((3, 3), (0, 2), (0, 2)),  # logits: q, k
    "bmm2": ((3, 1), (0, 1), (0, 2)),  # out: weights, v
}
_BACKWARD_PRODUCTS: dict[str, tuple[_Axes, _Axes, _Axes]] = {
    "bmm1_grad_gemm1": ((2, 1), (0, 1), (0, 2)),  # dk: d_logits, q
    "bmm1_grad_gemm2": ((3, 1), (0, 1), (0, 2)),  # dq: d_logits, k
    "bmm2_grad_gemm1": ((2, 1), (0, 1), (0, 2)),  # dv: weights, d_out
    "bmm2_grad_gemm2": ((3, 3), (0, 2), (0, 2)),  # d_weights: d_out, v
}
"""Contracting axes, and batch axes of both operands: arrays are [b, l, n, d], weights [b, n, q, k].
"""


def forward(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    lengths: Int[Array, "b"] | None = None,
) -> tuple[Float[Array, "b q n d"], Float[Array, "b n q"]]:
    """Attention to the first `lengths` keys of each sample, or to all; and its log-sum-exp.

    The log-sum-exp is the natural one of the scaled logits, in float32. Lengths must be >= 1.
    """
    statistics = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    operands = (q, k, v, *_lengths(q, lengths))
    name = "__cudnn$fmhaSoftmax"
    out, lse = _call(name, operands, (q,), (statistics,), _FORWARD_PRODUCTS, lengths)
    return out, lse


def forward_only(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    lengths: Int[Array, "b"] | None = None,
) -> Float[Array, "b q n d"]:
    """`forward` without the log-sum-exp."""
    operands = (q, k, v, *_lengths(q, lengths))
    return _call("__cudnn$fmhaSoftmax", operands, (q,), (), _FORWARD_PRODUCTS, lengths)[0]


def backward(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    out: Float[Array, "b q n d"],
    lse: Float[Array, "b n q"],
    d_out: Float[Array, "b q n d"],
    lengths: Int[Array, "b"] | None = None,
) -> tuple[Float[Array, "b q n d"], Float[Array, "b k n d"], Float[Array, "b k n d"]]:
    """Gradients of q, k and v.

    `out` and `lse` may be those of attention to more keys than `k`: the gradients are then the part
    of that attention's gradients which these keys contribute.
    """
    operands = (q, k, v, lse, d_out.astype(q.dtype), out, *_lengths(q, lengths))
    name = "__cudnn$fmhaSoftmaxBackward"
    d_q, d_k, d_v = _call(name, operands, (q, k, v), (), _BACKWARD_PRODUCTS, lengths)
    return d_q, d_k, d_v


def _lengths(q: Array, lengths: Array | None) -> tuple[Array, ...]:
    """Numbers of queries and of keys per sample, [b] int32."""
    if lengths is None:
        return ()
    return jnp.full(q.shape[:1], q.shape[1], jnp.int32), lengths.astype(jnp.int32)


def _call(
    name: str,
    operands: Sequence[Array],
    like: Sequence[Array],
    others: Sequence[jax.ShapeDtypeStruct],
    products: dict[str, tuple[_Axes, _Axes, _Axes]],
    lengths: Array | None,
) -> list[Array]:
    """Results in the shapes of `like` [b, l, n, d], then `others`.

    cuDNN's results are [b, n, l, d] arrays with the memory layout of [b, l, n, d].
    """
    q, k = operands[:2]
    swapped = [(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in like]
    results = [
        *(jax.ShapeDtypeStruct(s, x.dtype) for s, x in zip(swapped, like, strict=True)),
        *others,
        jax.ShapeDtypeStruct((0,), jnp.uint8),  # workspace; XLA gives it its size
    ]
    layouts = [(0, 2, 1, 3)] * len(like) + [None] * (len(others) + 1)
    call = jax.ffi.ffi_call(
        name,
        results,
        output_layouts=layouts,
        vmap_method="sequential",
        custom_call_api_version=2,
        legacy_backend_config=_config(q, k, products, padded=lengths is not None),
    )
    *arrays, _ = call(*operands)
    count = len(like)
    return [*(jnp.swapaxes(x, 1, 2) for x in arrays[:count]), *arrays[count:]]


def _config(q: Array, k: Array, products: dict, *, padded: bool) -> str:
    """XLA's `GpuBackendConfig` of the call as JSON."""
    b, length, n, d = q.shape
    attention = _SETTINGS | {
        "fmha_scale": d**-0.5,
        "intermediate_tensor_shape": {
            "element_type": _TYPES[str(q.dtype)],
            "dimensions": [str(x) for x in (b, n, length, k.shape[1])],
            "layout": {"minor_to_major": ["3", "2", "1", "0"]},
            "is_dynamic_dimension": [False] * 4,
        },
        "mask_type": "PADDING" if padded else "NO_MASK",
    }
    attention |= {f"{name}_dot_dimension_numbers": _axes(*axes) for name, axes in products.items()}
    return json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": attention})


def _axes(contracting: _Axes, left: _Axes, right: _Axes) -> dict:
    return {
        "lhs_contracting_dimensions": [str(contracting[0])],
        "rhs_contracting_dimensions": [str(contracting[1])],
        "lhs_batch_dimensions": [str(x) for x in left],
        "rhs_batch_dimensions": [str(x) for x in right],
    }
