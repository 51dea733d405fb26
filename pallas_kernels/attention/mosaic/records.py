"""Records of the attention kernels."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.attention import reference
from pallas_kernels.attention.mosaic import op, packed_op
from pallas_kernels.attention.mosaic.cases import (
    gradient_cases,
    masked_cases,
    packed_cases,
    packed_production,
    production,
    training_production,
)
from pallas_kernels.attention.mosaic.targets import BLACKWELL, HOPPER, Target
from pallas_kernels.kernel import BLACKWELL as ON_BLACKWELL
from pallas_kernels.kernel import HOPPER as ON_HOPPER
from pallas_kernels.kernel import Cost, Kernel
from pallas_kernels.nvfp4.format import (
    NVFP4,
    dequantize_reference,
)
from pallas_kernels.tokens import VISIBILITY_COLUMNS, Tokens, make, visible

WIDTH = 128
"""Head width of the 5B model."""
TOLERANCE = 5e-3
"""Relative error of bfloat16 operands and a bfloat16 result."""
FORWARD_TILES: dict[str, dict[str, tuple]] = {
    "Hopper": {"keys": (64, 128), "stages": (2, 3)},
    "Blackwell": {"keys": (128,), "stages": (2,)},  # all that fits tensor and shared memory
}
BACKWARD_TILES: dict[str, dict[str, tuple]] = {
    "Hopper": {"step": (64,), "stages": (2, 3, 4)},  # steps of 128 rows spill registers
    "Blackwell": {"stages": (2, 3)},
}
"""Chip -> tile sizes to try."""
BACKWARD_MODULES: dict[str, tuple[str, ...]] = {
    "Hopper": ("hopper_backward",),
    "Blackwell": ("blackwell_query_gradient", "blackwell_key_value_gradient"),
}
"""Chip -> modules of the backward kernels."""


def forward(target: Target, q, k, v, q_tokens, k_tokens, *, interpret=None, **tiles: int):
    """(output, log-sum-exp); `tiles` replace those of the target's forward kernel."""
    chip = dataclasses.replace(
        target, forward_tiles=dataclasses.replace(target.forward_tiles, **tiles)
    )
    return op.attend_mask(
        q, k, v, op.make_mask(q_tokens, k_tokens, target=chip), interpret=interpret
    )


def gradients(
    target: Target, q, k, v, grad, d_lse, q_tokens, k_tokens, *, interpret=None, **tiles: int
):
    """(output, log-sum-exp, dq, dk, dv); `tiles` replace those of the backward kernels."""
    chip = dataclasses.replace(
        target, backward_tiles=dataclasses.replace(target.backward_tiles, **tiles)
    )
    mask = op.make_mask(q_tokens, k_tokens, target=chip)
    out, pull = jax.vjp(lambda q, k, v: op.attend_mask(q, k, v, mask, interpret=interpret), q, k, v)
    return (*out, *pull((grad, d_lse)))


def forward_oracle(q, k, v, q_tokens, k_tokens):
    """`reference.attend_with_lse` in float32, where rows that nobody sees count as zeros."""
    q_tokens, k_tokens = _computed(q_tokens), _computed(k_tokens)
    mask = _mask(q_tokens, k_tokens)
    q = jnp.where(mask.any(-1)[..., None, None], q, 0)
    k, v = (jnp.where(mask.any(-2)[..., None, None], x, 0) for x in (k, v))

    @jax.checkpoint
    def head(part):
        with jax.default_matmul_precision("highest"):
            q, k, v = (x.astype(jnp.float32)[:, :, None] for x in part)
            return reference.attend_with_lse(q, k, v, q_tokens, k_tokens)

    # One head at a time: the logits of all heads at the model's sizes do not fit into memory.
    out, lse = lax.map(head, tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v)))
    return jnp.moveaxis(out[:, :, :, 0], 0, 2), jnp.moveaxis(lse[..., 0], 0, 2)


def gradients_oracle(q, k, v, grad, d_lse, q_tokens, k_tokens):
    """`forward_oracle` and its gradients; those of queries that see nothing are not read."""
    sighted = _mask(_computed(q_tokens), _computed(k_tokens)).any(-1)
    out, pull = jax.vjp(
        lambda q, k, v: forward_oracle(q, k, v, q_tokens, k_tokens),
        *(x.astype(jnp.float32) for x in (q, k, v)),
    )
    grad = jnp.where(sighted[..., None, None], grad, 0).astype(jnp.float32)
    return (*out, *pull((grad, jnp.where(sighted[..., None], d_lse, 0))))


def _computed(tokens: Tokens) -> Tokens:
    """The same tokens, of which compilers know no values: a mask is too large for a constant."""
    return jax.tree.map(lambda x: lax.optimization_barrier(jnp.asarray(x)), tokens)


def _mask(q_tokens: Tokens, k_tokens: Tokens) -> jax.Array:
    mask = jnp.asarray(visible(q_tokens, k_tokens))
    return mask if mask.ndim == 3 else mask[None]


def packed(q, own_k, own_v, k, v, q_tokens, k_tokens, offset, *, interpret=None):
    return packed_op.attend(q, own_k, own_v, k, v, q_tokens, k_tokens, offset, interpret=interpret)


def packed_oracle(q, own_k, own_v, k, v, q_tokens, k_tokens, offset):
    """`forward_oracle` of own keys and values, then dequantized past ones."""
    past_k, past_v = (dequantize_reference(x, jnp.float32) for x in (k, v))
    past_k = past_k if offset is None else past_k + offset.astype(jnp.float32)
    keys, values = (
        jnp.concatenate([own.astype(jnp.float32), x.reshape(x.shape[0], -1, *x.shape[3:])], axis=1)
        for own, x in ((own_k, past_k), (own_v, past_v))
    )
    return forward_oracle(q, keys, values, q_tokens, k_tokens)[0]


def pairs(q_tokens: Tokens, k_tokens: Tokens) -> int:
    """The number of visible pairs of all samples, counted by kind of token."""
    (queries, q_counts), (keys, k_counts) = _kinds(q_tokens), _kinds(k_tokens)
    samples = max(len(q_counts), len(k_counts))
    return int(
        sum(
            q_counts[i % len(q_counts)]
            @ np.asarray(visible(queries, keys), np.int64)
            @ k_counts[i % len(k_counts)]
            for i in range(samples)
        )
    )


def _kinds(tokens: Tokens) -> tuple[Tokens, np.ndarray]:
    """The different tokens, and how many of each a sample has [samples, kinds]."""
    columns = np.stack(
        [np.atleast_2d(getattr(tokens, name)).astype(np.int64) for name in VISIBILITY_COLUMNS]
    )
    _, samples, length = columns.shape
    kinds, index = np.unique(columns.reshape(len(columns), -1), axis=1, return_inverse=True)
    counts = [np.bincount(row, minlength=kinds.shape[1]) for row in index.reshape(samples, length)]
    chunk, noisy, start, sink, sinks = kinds
    different = make(
        np.zeros((kinds.shape[1], 3), np.int32),
        chunk, noisy.astype(bool), window_start=start, sink=sink, global_sinks=sinks,
    )  # fmt: skip
    return different, np.stack(counts)


def forward_cost(q, k, v, q_tokens, k_tokens) -> Cost:
    logits = pairs(q_tokens, k_tokens) * q.shape[2]
    lse = 4 * q.size // q.shape[-1]
    return Cost(2 * (2 * q.size + k.size + v.size) + lse, 4 * logits * q.shape[-1], logits)


def gradients_cost(q, k, v, grad, d_lse, q_tokens, k_tokens) -> Cost:
    """Five products of the backward pass and two of the forward pass; recomputing is extra."""
    once = forward_cost(q, k, v, q_tokens, k_tokens)
    moved = 2 * (4 * q.size + 2 * k.size + 2 * v.size) + 8 * q.size // q.shape[-1]
    return Cost(once.bytes + moved, 7 * once.flops // 2, 2 * once.exponentials)


def packed_cost(q, own_k, own_v, k: NVFP4, v: NVFP4, q_tokens, k_tokens, offset) -> Cost:
    logits = pairs(q_tokens, k_tokens) * q.shape[2]
    moved = 2 * (2 * q.size + own_k.size + own_v.size) + (k.size + v.size) * 9 // 16
    return Cost(moved, 4 * logits * q.shape[-1], logits)


def _operands() -> tuple[jax.ShapeDtypeStruct, Tokens]:
    """Operands of two heads and four block-causal chunks; no kernel depends on either number."""
    length = 1024
    tokens = make(np.zeros((length, 3), np.int32), np.arange(length) // (length // 4), False)
    return jax.ShapeDtypeStruct((1, length, 2, WIDTH), jnp.bfloat16), tokens


def _attention(tokens: Tokens, q: Any, k: Any, v: Any) -> Any:
    from pallas_kernels.attention import attention_with_lse

    return attention_with_lse(q, k, v, tokens, tokens, implementation="mosaic")


def _build_forward() -> tuple[Callable, tuple]:
    x, tokens = _operands()
    return functools.partial(_attention, tokens), (x, x, x)


def _build_gradients() -> tuple[Callable, tuple]:
    """Forward and backward pass: three kernels, for the output, for dq, and for dk and dv."""
    x, tokens = _operands()

    def run(q, k, v, grad):
        (out, lse), pull = jax.vjp(functools.partial(_attention, tokens), q, k, v)
        return out, pull((grad, lse))

    return run, (x, x, x, x)


def _of_chip(target: Target, chips: tuple[str, ...], instruction: str) -> tuple[Kernel, Kernel]:
    """The records of a chip's forward and backward kernels."""
    chip = target.name.lower()
    common: dict[str, Any] = {
        "op": "attention", "chips": chips, "refusal": op.unsupported, "target": target,
        "instructions": (instruction,), "tolerance": TOLERANCE, "device_tolerance": TOLERANCE,
    }  # fmt: skip
    return (
        Kernel(
            f"attention_forward_{chip}",
            build=_build_forward,
            run=functools.partial(forward, target),
            oracle=forward_oracle,
            cases=masked_cases(target),
            tiles=FORWARD_TILES[target.name],
            cost=forward_cost,
            production=production,
            modules=("attention.mosaic.op", f"attention.mosaic.{chip}_forward"),
            **common,
        ),
        Kernel(
            f"attention_gradients_{chip}",
            build=_build_gradients,
            run=functools.partial(gradients, target),
            oracle=gradients_oracle,
            cases=gradient_cases(target),
            tiles=BACKWARD_TILES[target.name],
            cost=gradients_cost,
            production=training_production,
            modules=(
                "attention.mosaic.op",
                f"attention.mosaic.{chip}_forward",
                *(f"attention.mosaic.{module}" for module in BACKWARD_MODULES[target.name]),
            ),
            launches=3,
            **common,
        ),
    )


KERNELS = (
    *_of_chip(HOPPER, ON_HOPPER, r"HGMMA\."),
    *_of_chip(BLACKWELL, ON_BLACKWELL, r"UTCHMMA"),
    Kernel(
        "attention_packed",
        op="attention_packed",
        chips=ON_BLACKWELL,
        build=packed_op.example_call,
        refusal=lambda q, *rest, **options: packed_op.refusal(q),
        run=packed,
        launch=packed_op.attend,
        oracle=packed_oracle,
        cases=packed_cases(),
        tiles={},
        cost=packed_cost,
        # Each of its kernels has one of the two.
        instructions=(r"UTCHMMA|F2FP\.F16\.E2M1\.",),
        production=packed_production,
        modules=("attention.mosaic.packed_op", "attention.mosaic.blackwell_forward"),
        tolerance=TOLERANCE,
        device_tolerance=1e-2,
        launches=4,  # own keys; past keys and values dequantized, then attended to
    ),
)
