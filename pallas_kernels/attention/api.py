"""`attention` and `attention_with_lse`: argument checks and choice of implementation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention import cudnn, cudnn_call, reference, xla
from pallas_kernels.attention.segmented import FusedKernel, attend_batched, batches
from pallas_kernels.attention.segments import attend_segments, segments
from pallas_kernels.dispatch import Implementation, Unsupported, platform, proven
from pallas_kernels.tokens import Tokens, is_static

AttentionFn = Callable[..., Array]
"""`(q, k, v, q_tokens, k_tokens) -> out`, the signature of `attention`.

Sequence parallelism wraps such a function.
"""

CUDNN = FusedKernel(cudnn_call.forward, cudnn_call.backward)
"""The kernel of "cudnn" for masks that split into segments."""


def _mosaic(*arguments) -> tuple[Array, Array]:
    from pallas_kernels.attention.mosaic import op  # takes 0.5 s to import; only GPUs need it

    return op.attend_with_lse(*arguments)


_RUN: dict[str, AttentionFn] = {
    "reference": reference.attend,
    "xla": xla.attend,
    "cudnn": cudnn.attend,
    "mosaic": lambda *arguments: _mosaic(*arguments)[0],
}
_RUN_WITH_LSE: dict[str, Callable[..., tuple[Array, Array]]] = {
    "reference": reference.attend_with_lse,
    "xla": xla.attend_with_lse,
    "cudnn": cudnn.attend_with_lse,
    "mosaic": _mosaic,
}
_MASKED_INSIDE = ("reference", "mosaic")
"""Implementations that apply the mask themselves and need no `segments`."""


def attention(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens | None = None,
    k_tokens: Tokens | None = None,
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "b q n d"]:
    """softmax(q k^T / sqrt(d)) v with the mask `visible(q_tokens, k_tokens)`.

    Without tokens nothing is masked. Fully masked queries give zeros. The softmax is computed in
    float32; the result has the dtype of `v`. Raises ValueError if tokens do not match the arrays,
    and `Unsupported` if a named implementation cannot run.
    """
    check_tokens(q, k, q_tokens, k_tokens)
    chosen = select_implementation(q, k, v, q_tokens, k_tokens, implementation=implementation)
    run = _RUN[chosen]
    segment_list = None if chosen in _MASKED_INSIDE else segments(q_tokens, k_tokens)
    if segment_list is None:
        return run(q, k, v, q_tokens, k_tokens)
    if chosen == "cudnn":
        return attend_batched(CUDNN, tuple(segment_list), q, k, v)
    return attend_segments(run, q, k, v, segment_list)


def attention_with_lse(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens | None = None,
    k_tokens: Tokens | None = None,
    *,
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "b q n d"], Float[Array, "b q n"]]:
    """`attention` and the natural log-sum-exp of each query's visible, scaled logits.

    The log-sum-exp is float32 and -inf for fully masked queries; it merges attention over disjoint
    sets of keys. Both results are differentiable.
    """
    check_tokens(q, k, q_tokens, k_tokens)
    chosen = select_implementation(q, k, v, q_tokens, k_tokens, implementation=implementation)
    run = _RUN_WITH_LSE[chosen]
    segment_list = None if chosen in _MASKED_INSIDE else segments(q_tokens, k_tokens)
    if segment_list is None:
        return run(q, k, v, q_tokens, k_tokens)
    return attend_segments(run, q, k, v, segment_list, lse=True)


def select_implementation(
    q: Array | jax.ShapeDtypeStruct,
    k: Array | jax.ShapeDtypeStruct,
    v: Array | jax.ShapeDtypeStruct,
    q_tokens: Tokens | None = None,
    k_tokens: Tokens | None = None,
    *,
    implementation: Implementation = "auto",
) -> Implementation:
    """The name of the implementation that `attention` uses for these arguments.

    "auto" selects "mosaic" where its kernels were proven and found faster on this kind of device
    (`dispatch.proven`), unless the mask is traced and cuDNN can run it; else "cudnn" where it can
    run (a GPU, 16-bit arguments, and a mask that splits into `segments` or is a number of leading
    keys per sample), else "xla". The device's compute capability selects the kernels. Raises
    ValueError for an unknown name and `Unsupported` if the named implementation cannot run.
    """
    why = cudnn.refusal(q, q_tokens, k_tokens, segments(q_tokens, k_tokens))
    if implementation == "auto":
        # Kernels were proven with a mask known when tracing; a traced one costs tile maps, and
        # cuDNN only a count of keys.
        if proven("attention", q) and (why is not None or _is_known(q_tokens, k_tokens)):
            return "mosaic"
        return "xla" if why else "cudnn"
    if implementation not in _RUN:
        raise ValueError(f"implementation {implementation!r}; choose from auto, {', '.join(_RUN)}")
    if implementation == "cudnn" and why:
        raise Unsupported(f"cudnn attention on {platform()}: {why}")
    if implementation == "mosaic":
        from pallas_kernels.attention.mosaic import op

        if why := op.refusal(q):
            raise Unsupported(f"mosaic attention on {platform()}: {why}")
    return implementation


def _is_known(q_tokens: Tokens | None, k_tokens: Tokens | None) -> bool:
    """Whether the mask is known when tracing."""
    return q_tokens is None or k_tokens is None or is_static(q_tokens, k_tokens)


def describe(
    q: Array | jax.ShapeDtypeStruct,
    q_tokens: Tokens,
    k_tokens: Tokens,
    *,
    implementation: Implementation = "auto",
) -> str:
    """How `attention` computes: its implementation, and the form that it gives the mask.

    "xla: loop over blocks" is the last resort: a program of small products with a condition each,
    on a GPU an order of magnitude slower than a fused kernel. Raises as `select_implementation`.
    """
    chosen = select_implementation(q, q, q, q_tokens, k_tokens, implementation=implementation)
    if chosen == "mosaic":
        return "mosaic: block-sparse kernels"
    segment_list = segments(q_tokens, k_tokens)
    if chosen != "reference" and segment_list is not None:
        calls = len(batches(segment_list)) if chosen == "cudnn" else len(segment_list)
        return f"{chosen}: {len(segment_list)} dense segments in {calls} calls"
    if chosen == "cudnn":
        return "cudnn: leading keys"
    if chosen == "xla" and xla.is_blocked(q, len(k_tokens)):
        return LAST_RESORT
    return f"{chosen}: dense mask"


LAST_RESORT = "xla: loop over blocks"
"""What `describe` calls the slowest path."""


def check_tokens(
    q: Array | jax.ShapeDtypeStruct,
    k: Array | jax.ShapeDtypeStruct,
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
) -> None:
    """Raises ValueError if tokens do not match the arrays."""
    if (q_tokens is None) != (k_tokens is None):
        raise ValueError("give tokens for queries and keys, or for neither")
    for name, x, tokens in (("query", q, q_tokens), ("key", k, k_tokens)):
        if tokens is None:
            continue
        if len(tokens) != x.shape[1]:
            raise ValueError(f"{len(tokens)} {name} tokens for {x.shape[1]} {name} rows")
        if jnp.ndim(tokens.chunk_index) == 2 and tokens.chunk_index.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"{name} tokens of {tokens.chunk_index.shape[0]} samples, not {x.shape[0]}"
            )
