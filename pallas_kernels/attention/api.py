"""attention(): checks, choice of implementation, and the type that wrappers keep."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention import cudnn, reference, xla
from pallas_kernels.attention.segments import by_segments, segments
from pallas_kernels.dispatch import Implementation, Unsupported, platform
from pallas_kernels.tokens import Tokens

AttentionFn = Callable[..., Array]
"""`(q, k, v, q_tokens, k_tokens) -> out`, as `attention`; what parallelism wraps."""


def _mosaic(*arguments) -> tuple[Array, Array]:
    from pallas_kernels.attention.mosaic import op  # half a second that CPUs need not spend

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
    "mosaic": _mosaic,
}
_MASKED_INSIDE = ("reference", "mosaic")
"""Implementations that need no `segments`."""


def attention(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens | None = None,
    k_tokens: Tokens | None = None,
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "b q n d"]:
    """softmax(q k^T / sqrt(d)) v over the pairs that `visible(q_tokens, k_tokens)` allows.

    Without tokens every pair is visible. A query that sees nothing gives zeros. The softmax is in
    float32; the result has the dtype of `v`. Raises ValueError for tokens that do not fit the
    arrays and `Unsupported` where a named implementation cannot run.
    """
    check(q, k, q_tokens, k_tokens)
    chosen = which(q, k, v, q_tokens, k_tokens, implementation=implementation)
    run = _RUN[chosen]
    parts = None if chosen in _MASKED_INSIDE else segments(q_tokens, k_tokens)
    return run(q, k, v, q_tokens, k_tokens) if parts is None else by_segments(run, q, k, v, parts)


def attention_with_lse(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    q_tokens: Tokens | None = None,
    k_tokens: Tokens | None = None,
    *,
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "b q n d"], Float[Array, "b q n"]]:
    """`attention`, and the natural log-sum-exp of every query's visible, scaled logits.

    The latter is float32, -inf for a query that sees nothing; both are differentiable. Attention
    over disjoint sets of keys is merged by it. "auto" is "xla"; cuDNN does not serve.
    """
    check(q, k, q_tokens, k_tokens)
    chosen: Implementation = "xla" if implementation == "auto" else implementation
    which(q, k, v, q_tokens, k_tokens, implementation=chosen)
    if chosen not in _RUN_WITH_LSE:
        known = ", ".join(_RUN_WITH_LSE)
        raise Unsupported(f"{chosen} attention gives no log-sum-exp; choose from {known}")
    run = _RUN_WITH_LSE[chosen]
    parts = None if chosen in _MASKED_INSIDE else segments(q_tokens, k_tokens)
    if parts is None:
        return run(q, k, v, q_tokens, k_tokens)
    return by_segments(run, q, k, v, parts, lse=True)


def which(
    q: Array | jax.ShapeDtypeStruct,
    k: Array | jax.ShapeDtypeStruct,
    v: Array | jax.ShapeDtypeStruct,
    q_tokens: Tokens | None = None,
    k_tokens: Tokens | None = None,
    *,
    implementation: Implementation = "auto",
) -> Implementation:
    """The implementation that `attention` uses for these arguments, by name.

    "cudnn" where it can run (a GPU, 16-bit arguments, and a mask that is one row a sample or falls
    into `segments`), else "xla". "mosaic" has not run on a GPU yet and so is only taken by name;
    which of its kernels, the compute capability of the device says.
    """
    why = cudnn.refusal(q, q_tokens, segments(q_tokens, k_tokens))
    if implementation == "auto":
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


def check(
    q: Array | jax.ShapeDtypeStruct,
    k: Array | jax.ShapeDtypeStruct,
    q_tokens: Tokens | None,
    k_tokens: Tokens | None,
) -> None:
    """Raises ValueError for tokens that do not fit the arrays."""
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
