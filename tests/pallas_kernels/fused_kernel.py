"""A `FusedKernel` in plain float32 operations, and programs as they are lowered for CUDA."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.attention.segmented import FusedKernel


def _logits(q, k):
    return jnp.einsum("bqnd,bknd->bnqk", q, k) * q.shape[-1] ** -0.5


def _forward(q, k, v):
    logits = _logits(q, k)
    out = jnp.einsum("bnqk,bknd->bqnd", jax.nn.softmax(logits), v)
    return out, jax.nn.logsumexp(logits, axis=-1)


def _backward(q, k, v, out, lse, d_out):
    """The textbook gradient, from the saved output and log-sum-exp."""
    weights = jnp.exp(_logits(q, k) - lse[..., None])
    delta = jnp.einsum("bqnd,bqnd->bnq", out, d_out)[..., None]
    d_logits = weights * (jnp.einsum("bqnd,bknd->bnqk", d_out, v) - delta) * q.shape[-1] ** -0.5
    return (
        jnp.einsum("bnqk,bknd->bqnd", d_logits, k),
        jnp.einsum("bnqk,bqnd->bknd", d_logits, q),
        jnp.einsum("bnqk,bqnd->bknd", weights, d_out),
    )


DENSE = FusedKernel(_forward, _backward)
"""Saves and returns what cuDNN's calls do, on any device."""


def lowered_for_cuda(fn: Callable, *arguments: jax.ShapeDtypeStruct) -> str:
    """The StableHLO of `jax.jit(fn)` for a CUDA device."""
    return jax.jit(fn).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
