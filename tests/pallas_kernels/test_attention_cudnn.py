"""cuDNN's attention without a GPU: its custom calls, and the calculation around them."""

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from longlive_jax.layout import grid, teacher_forcing
from pallas_kernels.attention import api, attention, cudnn, cudnn_call, select_implementation
from pallas_kernels.attention.segmented import attend_batched, batches
from pallas_kernels.attention.segments import segments
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.tokens import EMPTY, concat, make
from tests.pallas_kernels import deviceless
from tests.pallas_kernels.fused_kernel import DENSE, lowered_for_cuda

CALL = re.compile(r'custom_call @(__cudnn\S+?)\(.*backend_config = "(.*?)", (operand_.*)$', re.M)


def custom_calls(stablehlo):
    """(target, config, layouts and types) of every cuDNN call."""
    calls = CALL.findall(stablehlo)
    return [(name, json.loads(text.replace("\\22", '"')), rest) for name, text, rest in calls]


def same_config(ours, theirs):
    """Whether all values of ours are in theirs, which also states what is empty."""
    if isinstance(ours, dict):
        return all(same_config(x, theirs[name]) for name, x in ours.items())
    return ours == theirs


def shapes(batch=2, queries=256, keys=384, heads=3, width=64, dtype="bfloat16"):
    q, k = (jax.ShapeDtypeStruct((batch, n, heads, width), dtype) for n in (queries, keys))
    return q, k, k


LENGTHS = jax.ShapeDtypeStruct((2,), jnp.int32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("padded", [False, True], ids=["all keys", "leading keys"])
def test_the_custom_calls_are_those_of_jax(padded, dtype, monkeypatch):
    """Operands, results, layouts and settings, forward and backward."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    arguments = (*shapes(dtype=dtype), LENGTHS) if padded else shapes(dtype=dtype)

    def theirs(q, k, v, lengths=None):
        attend = partial(
            jax.nn.dot_product_attention, implementation="cudnn", key_value_seq_lengths=lengths
        )
        out, pull = jax.vjp(attend, q, k, v)
        return attend(q, k, v), pull(out)

    def ours(q, k, v, lengths=None):
        out, lse = cudnn_call.forward(q, k, v, lengths)
        grads = cudnn_call.backward(q, k, v, out, lse, out, lengths)
        return cudnn_call.forward_only(q, k, v, lengths), grads

    got, want = (
        sorted(custom_calls(lowered_for_cuda(fn, *arguments)), key=lambda call: (call[0], call[2]))
        for fn in (ours, theirs)
    )
    assert len(got) == len(want) == 3
    for (name, config, types), (name_of_jax, config_of_jax, types_of_jax) in zip(
        got, want, strict=True
    ):
        assert (name, types) == (name_of_jax, types_of_jax)
        assert same_config(config, config_of_jax)


def cached(*slots):
    """A chunk of 6 tokens being denoised against slots of 6 tokens, one row of slots a sample."""
    own = grid(2, 1, 3, chunk_frames=2, start=4, noisy=True)
    chunk = np.repeat(slots, 6, axis=1)
    return own, make(np.zeros((*chunk.shape, 3), np.int32), chunk, False)


@pytest.fixture
def on_gpu(monkeypatch):
    """Choices are made as on an H200, and calls compute in plain operations."""
    monkeypatch.setattr(cudnn, "platform", lambda: "gpu")
    monkeypatch.setattr(cudnn, "capability", lambda: "9.0")


def test_a_mask_row_must_be_a_number_of_leading_keys(on_gpu):
    q, k, v = shapes(queries=6, keys=12, width=8)
    select = partial(select_implementation, q, k, v, implementation="cudnn")
    assert select(*cached([0, 1], [0, EMPTY])) == "cudnn"
    with pytest.raises(Unsupported, match="visible keys first"):
        select(*cached([0, 1], [EMPTY, 0]))
    own, slots = cached([0, 1], [0, EMPTY])
    unknown = jax.tree.map(jnp.asarray, slots)
    with pytest.raises(Unsupported, match="not known to come in that order"):
        select(own, unknown)
    assert select(own, unknown.replace(leading=True)) == "cudnn"
    with pytest.raises(Unsupported, match="queries differ in their masks"):
        select(unknown.replace(leading=True), unknown)


def test_proven_kernels_leave_traced_masks_to_cudnn(on_gpu, monkeypatch):
    """A chunk's mask over the cache is data; the kernels would compute tile maps in every layer."""
    monkeypatch.setattr(api, "proven", lambda op, q: True)
    q, k, v = shapes(queries=6, keys=12, width=8)
    own, slots = cached([0, 1], [0, EMPTY])
    traced = jax.tree.map(jnp.asarray, slots)
    assert select_implementation(q, k, v, own, traced.replace(leading=True)) == "cudnn"
    assert select_implementation(q, k, v, own, traced) == "mosaic"
    assert select_implementation(q, k, v, own, slots) == "mosaic"
    assert select_implementation(q, k, v) == "mosaic"


def padded_dense(q, k, v, lengths=None):
    """`cudnn_call.forward` in plain operations."""
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k) * q.shape[-1] ** -0.5
    if lengths is not None:
        is_key = jnp.arange(k.shape[1]) < lengths[:, None]
        logits = jnp.where(is_key[:, None, None], logits, -jnp.inf)
    out = jnp.einsum("bnqk,bknd->bqnd", jax.nn.softmax(logits), v)
    return out, jax.nn.logsumexp(logits, axis=-1)


def padded_dense_backward(q, k, v, out, lse, d_out, lengths=None):
    """`cudnn_call.backward` by automatic differentiation, for `out` and `lse` of these keys."""
    return jax.vjp(lambda *x: padded_dense(*x, lengths)[0], q, k, v)[1](d_out)


@pytest.fixture
def computed(on_gpu, monkeypatch):
    """cuDNN's calls in plain operations on this device."""
    monkeypatch.setattr(cudnn, "refusal", lambda *_: None)
    monkeypatch.setattr(cudnn_call, "forward", padded_dense)
    monkeypatch.setattr(cudnn_call, "forward_only", lambda *x: padded_dense(*x)[0])
    monkeypatch.setattr(cudnn_call, "backward", padded_dense_backward)
    monkeypatch.setattr(api, "CUDNN", DENSE)


def normal(*shape):
    return [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(1), 3)]


@pytest.mark.parametrize("masked", [True, False])
def test_output_log_sum_exp_and_gradients_equal_the_reference(masked, computed):
    """One sample sees two slots, one a single slot, one nothing."""
    q, *_ = normal(3, 6, 2, 8)
    _, k, v = normal(3, 12, 2, 8)
    tokens = cached([0, 1], [0, EMPTY], [EMPTY, EMPTY]) if masked else (None, None)

    def total(implementation, *operands):
        out, lse = api.attention_with_lse(*operands, *tokens, implementation=implementation)
        alone = attention(*operands, *tokens, implementation=implementation)
        finite = jnp.where(jnp.isfinite(lse), lse, 0.0)
        return jnp.sum(jnp.sin(out)) + jnp.sum(finite**2) + jnp.sum(alone**3), (out, lse, alone)

    run = [
        jax.jit(jax.value_and_grad(partial(total, name), (0, 1, 2), has_aux=True))(q, k, v)
        for name in ("cudnn", "reference")
    ]
    chex.assert_trees_all_close(*run, rtol=2e-5, atol=2e-5)


def balanced_tokens(chunks, ranks, tokens=3):
    """Clean and noisy chunks of every rank, in the order of Balanced SP."""
    per_rank = chunks // ranks
    parts = itertools.product(range(ranks), (False, True))
    return concat(
        *(
            grid(per_rank, 1, tokens, chunk_frames=1, start=rank * per_rank, noisy=noisy)
            for rank, noisy in parts
        )
    )


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_batched_segments_equal_the_masked_reference(ranks):
    """Values and gradients in Balanced order, for two samples."""
    tokens = balanced_tokens(8, ranks)
    q, k, v = normal(2, len(tokens), 2, 8)
    pieces = tuple(segments(tokens, tokens))

    def total(attend, *operands):
        out = attend(*operands)
        return jnp.sum(jnp.sin(out) * out), out

    def run(attend):
        return jax.jit(jax.value_and_grad(partial(total, attend), (0, 1, 2), has_aux=True))(q, k, v)

    got = run(partial(attend_batched, DENSE, pieces))
    want = run(lambda *x: attention(*x, tokens, tokens, implementation="reference"))
    chex.assert_trees_all_close(got, want, rtol=2e-5, atol=2e-5)


def test_fully_masked_queries_give_zeros_and_no_gradient():
    q_tokens = make(np.zeros((4, 3), np.int32), [0, 0, EMPTY, EMPTY], False)
    k_tokens = grid(2, 1, 3, chunk_frames=1)
    q, *_ = normal(1, 4, 2, 8)
    _, k, v = normal(1, 6, 2, 8)
    attend = partial(attend_batched, DENSE, tuple(segments(q_tokens, k_tokens)))
    out, pull = jax.vjp(attend, q, k, v)
    want = attention(q, k, v, q_tokens, k_tokens, implementation="reference")
    chex.assert_trees_all_close(out, want, rtol=1e-5, atol=1e-5)
    d_q, *_ = pull(jnp.ones_like(out))
    assert (d_q[:, 2:] == 0).all() and (out[:, 2:] == 0).all()


@pytest.mark.parametrize(("seconds", "chunks"), [(16, 12), (32, 24), (64, 48)])
def test_long_clips_are_dense_segments_in_one_call_a_chunk(seconds, chunks, on_gpu):
    tokens = teacher_forcing(8 * chunks, 22, 40, chunk_frames=8)
    pieces = segments(tokens, tokens)
    assert (len(pieces), len(batches(pieces))) == (2 * chunks, chunks)
    x = jax.ShapeDtypeStruct((1, len(tokens), 6, 128), "bfloat16")
    assert select_implementation(x, x, x, tokens, tokens) == "cudnn"
    want = f"cudnn: {2 * chunks} dense segments in {chunks} calls"
    assert api.describe(x, tokens, tokens) == want


def test_a_layer_loop_has_cudnn_calls_and_no_conditional(on_gpu):
    """Forward and backward of a scan over layers, static segments and leading keys."""
    tokens = balanced_tokens(4, 2, tokens=8)
    own, slots = cached([0, 1], [0, EMPTY])
    slots = slots.replace(leading=True)
    x = jax.ShapeDtypeStruct((3, 2, len(tokens), 2, 64), "bfloat16")
    rows, keys = (jax.ShapeDtypeStruct((3, 2, n, 2, 64), "bfloat16") for n in (6, 12))

    def total(attend, q, k, v):
        def layer(carry, qkv):
            return carry + jnp.sum(attend(*qkv).astype(jnp.float32)), None

        return jax.lax.scan(layer, 0.0, (q, k, v))[0]

    barriers: list[int] = []

    def calls(attend, *arguments):
        gradient = jax.value_and_grad(partial(total, attend), (0, 1, 2))
        text = lowered_for_cuda(gradient, *arguments)
        assert "stablehlo.case" not in text and "stablehlo.if" not in text
        barriers.append(text.count("stablehlo.optimization_barrier"))
        return [name for name, *_ in custom_calls(text)]

    forward, backward = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
    got = calls(lambda *qkv: attention(*qkv, tokens, tokens), x, x, x)
    assert sorted(got) == [forward] * 4 + [backward] * 4
    assert barriers == [8]  # one after every call, so that their slices do not exist at once
    got = calls(lambda q, k, v: attention(q, k, v, own, slots), rows, keys, keys)
    assert sorted(got) == [forward, backward]


def compiled(mode):
    """Facts of `compile_attention.py` on the program for an H200."""
    script = pathlib.Path(__file__).with_name("compile_attention.py")
    root = str(script.parents[2])
    done = subprocess.run(
        [sys.executable, str(script), "h200", mode],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=root,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(deviceless.refusal() is not None, reason=str(deviceless.refusal()))
@pytest.mark.parametrize("mode", ["static", "traced"])
def test_compiled_for_an_h200_nothing_is_quadratic_in_the_tokens(mode):
    """Static columns give one call a chunk and pass, and no conditional; traced ones give a loop
    over pairs of blocks with one in each pass."""
    facts = compiled(mode)
    calls = facts["forward"], facts["backward"], facts["conditionals"]
    assert calls == ((4, 4, 0) if mode == "static" else (0, 0, 2))
    one_argument = 3 * facts["tokens"] * 3 * 128  # q, k or v of all layers
    assert facts["largest_array"] < 1.01 * one_argument < facts["tokens"] ** 2
    assert facts["temporary_bytes"] < 16 * one_argument * 2
