"""Attention to packed keys: all implementations against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention, packed_kv, reference
from pallas_kernels.attention.mosaic import packed_op
from pallas_kernels.attention.packed_kv import (
    attention_packed,
    dequantize_kv,
    select_packed_implementation,
)
from pallas_kernels.dispatch import Unsupported, assumed_device
from pallas_kernels.nvfp4 import BLOCK, NVFP4, dequantize
from pallas_kernels.nvfp4.format import CODE_DTYPE, SCALE_DTYPE
from pallas_kernels.tokens import EMPTY, concat, make
from tests.pallas_kernels.interpreter import SIMULATED, no_races


def problem(*, batch=1, slots=2, tokens=64, heads=2, width=64, own=40, dtype=jnp.bfloat16):
    """(q, own k, own v, packed k, packed v), an offset, and tokens whose first slot is empty."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((batch, own, heads, width)), dtype) for _ in range(3)
    )
    shape = (batch, slots, tokens, heads, width)
    past = (random_array(rng, shape, amax) for amax in (6.0, 9.0))
    offset = jnp.asarray(3 * rng.standard_normal((batch, slots, 1, heads, width)), jnp.float32)
    chunk = np.repeat(np.where(np.arange(slots) == 0, EMPTY, np.arange(slots)), tokens)
    mine = make(np.zeros((own, 3), np.int32), slots, True, uniform_mask=True)
    theirs = make(np.zeros((slots * tokens, 3), np.int32), chunk, False)
    return (q, k, v, *past), offset, (mine, concat(mine, theirs))


def random_array(rng, shape, amax) -> NVFP4:
    codes = (2 * rng.standard_normal(shape)).astype(CODE_DTYPE)
    scales = rng.uniform(50, 250, (*shape[:-1], shape[-1] // BLOCK)).astype(SCALE_DTYPE)
    largest = amax * (1 + np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape[:2]))
    return NVFP4(jnp.asarray(codes), jnp.asarray(scales), jnp.asarray(largest), "mse")


def distance(got, want) -> float:
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize(
    ("dtype", "most", "restored"), [(jnp.float32, 1e-5, True), (jnp.bfloat16, 1e-2, False)]
)
def test_unpacking_equals_the_oracle(dtype, most, restored):
    arguments, mean, tokens = problem(batch=2, dtype=dtype)
    offset = mean if restored else None
    want = attention_packed(*arguments, *tokens, offset=offset, implementation="reference")
    for implementation in ("auto", "xla"):
        got = attention_packed(*arguments, *tokens, offset=offset, implementation=implementation)
        assert got.dtype == dtype and distance(got, want) < most
    q, k, v, past_k, past_v = arguments
    k, v = (
        jnp.concatenate([x, dequantize(y, jnp.float32).reshape(2, -1, *x.shape[2:])], axis=1)
        for x, y in ((k, past_k), (v, past_v))
    )
    shift = jnp.repeat(mean, 64, axis=2).reshape(2, -1, 2, 64) if restored else 0.0
    plain = attention(q, k.at[:, 40:].add(shift), v, *tokens, implementation="reference")
    assert distance(want, plain) < most


def test_an_offset_per_token_is_restored():
    arguments, _, _ = problem(dtype=jnp.float32)
    mean = jnp.arange(2 * 64 * 2, dtype=jnp.bfloat16).reshape(1, 2, 64, 2, 1)
    got = dequantize_kv(arguments[3], mean, jnp.float32)
    want = dequantize(arguments[3], jnp.float32) + mean.astype(jnp.float32)
    np.testing.assert_array_equal(got, want.reshape(1, -1, 2, 64))


def test_the_kernel_equals_the_oracle():
    """An incomplete query tile, an empty slot, an offset, and no race."""
    arguments, offset, tokens = problem(heads=1, tokens=128)
    want = attention_packed(*arguments, *tokens, offset=offset, implementation="reference")
    with no_races(kernels=4):  # own keys; past keys and values dequantized, and attended to
        got = packed_op.attend(*arguments, *tokens, offset, interpret=SIMULATED)
    assert distance(got, want) < 5e-3


@pytest.mark.parametrize("kind", ["none", "per token"])
def test_the_kernel_with_slots_of_odd_length(kind):
    arguments, _, tokens = problem(heads=1, tokens=80)
    offset = None if kind == "none" else jnp.linspace(-1.0, 1.0, 160).reshape(1, 2, 80, 1, 1)
    want = attention_packed(*arguments, *tokens, offset=offset, implementation="reference")
    with no_races(kernels=4):
        got = packed_op.attend(*arguments, *tokens, offset, interpret=SIMULATED)
    assert distance(got, want) < 5e-3


def test_the_kernel_without_an_offset_and_with_fully_masked_queries():
    (_, k, _, past_k, past_v), _, (_, k_tokens) = problem(heads=1)
    masked = make(np.zeros((8, 3), np.int32), EMPTY, False)
    queries = concat(make(np.zeros((32, 3), np.int32), 2, True), masked)
    past = make(np.zeros((128, 3), np.int32), k_tokens.chunk_index[40:], False)
    with no_races(kernels=3):
        out, lse = packed_op.attend_packed(k, past_k, past_v, queries, past, interpret=SIMULATED)
    keys, values = (dequantize_kv(x, None, jnp.float32) for x in (past_k, past_v))
    want, want_lse = reference.attend_with_lse(k.astype(jnp.float32), keys, values, queries, past)
    assert distance(out, want) < 5e-3
    np.testing.assert_allclose(lse, want_lse, atol=2e-3)
    assert not np.asarray(out[0, -8:], np.float32).any() and np.isneginf(lse[0, -8:]).all()


def test_the_kernel_with_an_empty_cache():
    (q, _, _, past_k, past_v), _, _ = problem(heads=1)
    queries, past = (make(np.zeros((n, 3), np.int32), c, False) for n, c in ((40, 0), (128, EMPTY)))
    with no_races(kernels=3):
        out, lse = packed_op.attend_packed(q, past_k, past_v, queries, past, interpret=SIMULATED)
    assert not np.asarray(out, np.float32).any() and np.isneginf(lse).all()


@pytest.mark.parametrize(
    ("capability", "change", "message"),
    [
        ("", {}, "needs Blackwell .sm_100.; this is cpu: use implementation='auto'"),
        ("9.0", {}, "needs Blackwell .sm_100.; this is sm_90: use implementation='auto'"),
        ("10.0", {"dtype": jnp.float32}, "queries must be bfloat16, got float32"),
        ("10.0", {"width": 96}, "the head width must be 64 or 128, got 96"),
    ],
)
def test_the_kernel_refuses_unsupported_arguments(capability, change, message, monkeypatch):
    monkeypatch.setattr(packed_kv, "platform", lambda: "gpu" if capability else "cpu")
    monkeypatch.setattr(packed_kv, "capability", lambda: capability)
    (q, _, _, past, _), offset, _ = jax.eval_shape(lambda: problem(**change))
    with pytest.raises(Unsupported, match=message):
        select_packed_implementation(q, past, offset, implementation="mosaic")


def test_auto_does_not_select_an_unproven_kernel():
    arguments, offset, _ = problem()
    with assumed_device("gpu", "10.0", "NVIDIA GB200 of the tests"):
        assert select_packed_implementation(arguments[0], arguments[3], offset) == "cudnn"
