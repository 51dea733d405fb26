"""Attention in plain XLA operations: against the reference, its memory, FLOPs and dtypes."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.layout import grid, teacher_forcing, windowed
from pallas_kernels.attention import (
    attention,
    attention_with_lse,
    blocked,
    select_implementation,
    xla,
)
from pallas_kernels.attention.segments import Segment, segments
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.tokens import EMPTY, concat, make, visible
from tests.pallas_kernels import hlo


def arrays(queries, keys, *, batch=2, heads=3, width=8, dtype=jnp.float32):
    shapes = ((batch, queries, heads, width), *2 * ((batch, keys, heads, width),))
    return [
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(jax.random.split(jax.random.key(0), 3), shapes, strict=True)
    ]


def traced(tokens):
    """The same tokens as JAX arrays, which are traced under `jit`."""
    return jax.tree.map(jnp.asarray, tokens)


def cached():
    """A chunk being denoised against slots, one sample with an empty slot."""
    own = grid(2, 1, 3, chunk_frames=2, start=4, noisy=True)
    slots = np.repeat([[0, 1], [0, EMPTY]], 6, axis=1)
    return own, concat(own, make(np.zeros((2, 12, 3), np.int32), slots, False))


def balanced():
    """Clean and noisy frames of the first rank, then of the second."""
    parts = ((rank, noisy) for rank in range(2) for noisy in (False, True))
    return concat(*(grid(2, 1, 3, chunk_frames=1, start=2 * r, noisy=noisy) for r, noisy in parts))


def layouts():
    forced = teacher_forcing(6, 1, 3, chunk_frames=2)
    cuts = np.array([False, True, False])
    return {
        "bidirectional": 2 * (grid(4, 1, 3, chunk_frames=4),),
        "causal": 2 * (grid(6, 1, 3, chunk_frames=2),),
        "teacher forcing": 2 * (forced,),
        "Balanced order": 2 * (balanced(),),
        "windowed": 2 * (windowed(forced, cuts, window=2, global_sinks=0),),
        "cached": cached(),
        "fully masked queries": (
            make(np.zeros((4, 3), np.int32), [0, 0, EMPTY, EMPTY], False),
            grid(2, 1, 3, chunk_frames=1),
        ),
    }


@pytest.mark.parametrize("known", [True, False], ids=["known", "traced"])
@pytest.mark.parametrize("dense_bytes", [1 << 30, 0], ids=["dense", "blocked"])
@pytest.mark.parametrize("name", layouts())
def test_xla_equals_reference_in_values_and_gradients(name, dense_bytes, known, monkeypatch):
    monkeypatch.setattr(xla, "DENSE_BYTES", dense_bytes)
    monkeypatch.setattr(blocked, "MAX_BLOCK", 7)
    q_tokens, k_tokens = layouts()[name]
    if not known:
        q_tokens, k_tokens = traced(q_tokens), traced(k_tokens)
    operands = arrays(len(q_tokens), len(k_tokens))

    def weighted(implementation, q, k, v):
        out, lse = attention_with_lse(q, k, v, q_tokens, k_tokens, implementation=implementation)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.exp(lse)) / 9, (out, lse)

    def run(implementation):
        fn = jax.value_and_grad(partial(weighted, implementation), (0, 1, 2), has_aux=True)
        return jax.jit(fn)(*operands)

    got, want = run("xla"), run("reference")
    chex.assert_tree_all_finite(got[1])
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dense_bytes", [1 << 30, 0], ids=["dense", "blocked"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (37, 53), (131, 7)])
def test_any_lengths_are_supported(queries, keys, dense_bytes, monkeypatch):
    monkeypatch.setattr(xla, "DENSE_BYTES", dense_bytes)
    monkeypatch.setattr(blocked, "MAX_BLOCK", 16)
    rng = np.random.default_rng(0)
    q_tokens, k_tokens = (
        make(np.zeros((n, 3), np.int32), np.sort(rng.integers(-1, 3, n)), np.arange(n) > n // 2)
        for n in (queries, keys)
    )
    operands = arrays(queries, keys)

    @jax.jit
    def run(unknown, *operands):
        return [
            [attention_with_lse(*operands, *tokens, implementation=i) for tokens in token_pairs]
            for i, token_pairs in (
                ("xla", (unknown, (q_tokens, k_tokens), (None, None))),
                ("reference", (unknown, unknown, (None, None))),
            )
        ]

    got, want = run((traced(q_tokens), traced(k_tokens)), *operands)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_log_sum_exp_merges_attention_over_disjoint_keys():
    q_tokens, k_tokens = layouts()["teacher forcing"]
    q, k, v = arrays(len(q_tokens), len(k_tokens))

    @jax.jit
    def both(q, k, v):
        parts = []
        for half in (slice(0, 17), slice(17, None)):
            keys = jax.tree.map(lambda x, half=half: x[half], k_tokens)
            parts.append(attention_with_lse(q, k[:, half], v[:, half], q_tokens, keys))
        lse = jax.nn.logsumexp(jnp.stack([part[1] for part in parts]), axis=0)
        merged = sum(out * jnp.exp(own - lse)[..., None] for out, own in parts)
        scaled = jnp.einsum("bqnd,bknd->bqnk", q, k) / np.sqrt(8)
        mask = visible(q_tokens, k_tokens)[None, :, None]
        want = jax.nn.logsumexp(jnp.where(mask, scaled, -jnp.inf), axis=-1)
        return (merged, lse), (attention(q, k, v, q_tokens, k_tokens), want)

    got, want = both(q, k, v)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


def test_without_tokens_everything_is_visible():
    q, k, v = arrays(5, 7)
    want = jax.nn.dot_product_attention(q, k, v)
    for implementation in ("reference", "xla"):
        got = attention(q, k, v, implementation=implementation)
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


def test_sixteen_bit_arguments_keep_a_float32_softmax():
    q, k, v = arrays(12, 12, dtype=jnp.bfloat16)
    tokens = grid(4, 1, 3, chunk_frames=2)
    got = attention(q, k, v, tokens, tokens, implementation="xla")
    want = attention(
        *(x.astype(jnp.float32) for x in (q, k, v)), tokens, tokens, implementation="reference"
    )
    assert got.dtype == jnp.bfloat16
    chex.assert_trees_all_close(got.astype(jnp.float32), want, rtol=2e-2, atol=2e-2)


def test_gradients_are_summed_in_float32_over_blocks(monkeypatch):
    """With a GPU's 16-bit products, many blocks are as accurate as one."""
    monkeypatch.setattr(xla, "platform", lambda: "gpu")
    monkeypatch.setattr(xla, "DENSE_BYTES", 0)
    q, k, v = (
        x.astype(jnp.bfloat16) + jnp.bfloat16(0.5)
        for x in arrays(512, 512, batch=1, heads=1, width=16)
    )

    def gradients(implementation, *qkv):
        attend = partial(attention, implementation=implementation)
        fn = jax.grad(lambda *qkv: jnp.sum(attend(*qkv).astype(jnp.float32) ** 2), (0, 1, 2))
        return [np.asarray(x, np.float32) for x in jax.jit(fn)(*qkv)]

    want = gradients("reference", *(x.astype(jnp.float32) for x in (q, k, v)))
    errors = []
    for block in (512, 4):
        monkeypatch.setattr(blocked, "MAX_BLOCK", block)
        got = gradients("xla", q, k, v)
        errors.append(
            [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, want, strict=True)]
        )
    single, many = np.array(errors)
    assert (single < 1e-2).all() and (many < 1.1 * single).all(), errors


@pytest.mark.parametrize(("dense_bytes", "products"), [(0, 2 + 5), (1 << 30, 2 + 4)])
def test_products_on_a_gpu_have_sixteen_bit_operands_in_both_passes(
    dense_bytes, products, monkeypatch
):
    """A mixed product would run in float32, many times as slow. The FLOPs are those of the forward
    and backward products, where blocked attention recomputes the logits once."""
    monkeypatch.setattr(xla, "platform", lambda: "gpu")
    monkeypatch.setattr(xla, "DENSE_BYTES", dense_bytes)
    length, width = 64, 128
    total = partial(total_of, tokens=traced(grid(4, 4, 4, chunk_frames=4)))
    operands = arrays(length, length, batch=1, heads=2, width=width, dtype=jnp.bfloat16)
    lowered = jax.jit(jax.grad(total, (0, 1, 2))).lower(*operands)
    assert hlo.product_dtypes(lowered.as_text()) == {"bf16"}
    flops = lowered.compile().cost_analysis()["flops"]
    assert products < flops / (2 * 2 * length**2 * width) < products + 0.5


def total_of(q, k, v, tokens):
    out, lse = attention_with_lse(q, k, v, tokens, tokens, implementation="xla")
    return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(jnp.where(lse > -1e9, lse, 0.0))


@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_fully_masked_blocks_are_not_read(where, monkeypatch):
    """Only their own chunk attends to noisy keys, so NaN there must not reach other queries, as it
    would through a mask that is applied after the products."""
    monkeypatch.setattr(xla, "platform", lambda: where)
    monkeypatch.setattr(xla, "DENSE_BYTES", 0)
    monkeypatch.setattr(blocked, "MAX_BLOCK", 8)
    tokens = traced(teacher_forcing(4, 2, 4, chunk_frames=1))  # one block per chunk
    q, k, v = arrays(64, 64)
    last = slice(56, 64)  # noisy
    spoiled = [x.at[:, last].set(jnp.nan) for x in (q, k, v)]
    attend = partial(attention, implementation="xla")
    want = attend(q, k, v, tokens, tokens)
    got = attend(*spoiled, tokens, tokens)
    assert np.isnan(got[:, last]).all()
    np.testing.assert_array_equal(got[:, :56], want[:, :56])
    gradient = jax.grad(lambda *x: jnp.sum(attend(*x, tokens, tokens)[:, :56] ** 2), (0, 1, 2))
    # Clean keys also get gradients from the last chunk's queries: zeros times NaN.
    for own, a, b in zip((0, 32, 32), gradient(*spoiled), gradient(q, k, v), strict=True):
        assert np.isnan(a[:, last]).all()
        np.testing.assert_array_equal(a[:, own:56], b[:, own:56])


@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_blocked_attention_has_no_quadratic_array(where, monkeypatch):
    """The compiled program of value and gradient with traced tokens is checked."""
    monkeypatch.setattr(xla, "platform", lambda: where)
    monkeypatch.setattr(blocked, "MAX_BLOCK", 64)
    tokens = traced(teacher_forcing(4, 8, 8, chunk_frames=1))
    length = len(tokens)
    operands = arrays(length, length, batch=1, heads=2, dtype=jnp.bfloat16)

    def total(q, k, v, tokens):
        def layer(x, qkv):
            out, lse = attention_with_lse(*qkv, tokens, tokens, implementation="xla")
            return x + jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse), None

        layers = (jnp.stack([x, x]) for x in (q, k, v))  # masks must not be hoisted out of the scan
        return jax.lax.scan(layer, jnp.zeros(()), tuple(layers))[0]

    def largest(dense_bytes):
        monkeypatch.setattr(xla, "DENSE_BYTES", dense_bytes)
        program = jax.jit(lambda *arguments: jax.value_and_grad(total, (0, 1, 2))(*arguments))
        return hlo.largest_array(program.lower(*operands, tokens).compile().as_text())

    assert largest(dense_bytes=0) < length**2 // 8
    assert largest(dense_bytes=1 << 30) >= length**2  # dense attention has one


@pytest.mark.parametrize(
    ("frames", "ranks", "want"), [(96, 4, 17424), (192, 8, 69696), (384, 8, 278784)]
)
def test_the_last_resort_visits_the_pairs_of_blocks_that_see_each_other(frames, ranks, want):
    """Traced columns at 1280x704 in Balanced order: of all pairs, those with a visible pair of
    tokens, counted from the chunks that every block holds."""
    # 1. Pairs of blocks that the loop does not skip.
    chunks = frames // 8
    order = partial(np.concatenate, axis=0)
    columns = [np.split(np.arange(chunks), ranks)] * 2
    ordered = order([part for pair in zip(*columns, strict=True) for part in pair])
    noisy = order([np.repeat([False, True], chunks // ranks)] * ranks)
    tokens = make(
        np.zeros((2 * chunks * 7040, 3), np.int32), np.repeat(ordered, 7040), np.repeat(noisy, 7040)
    )
    size = blocked._block(len(tokens))
    kinds = blocked._block_kinds(tokens, tokens, size, size)[0]
    assert kinds.size == want
    # 2. The same from sets.
    kind = 2 * np.repeat(ordered, 7040) + np.repeat(noisy, 7040)
    held = [set(kind[i : i + size].tolist()) for i in range(0, len(kind), size)]

    def sees(q, k):
        (mine, denoised), (theirs, noise) = divmod(q, 2), divmod(k, 2)
        if noise:
            return denoised and mine == theirs
        return theirs < mine or (theirs == mine and not denoised)

    visited = sum(any(sees(q, k) for q in a for k in b) for a in held for b in held)
    assert int((kinds > 0).sum()) == visited


def test_segments_are_the_visible_key_slices():
    tokens = teacher_forcing(3, 1, 2, chunk_frames=1)
    clean = [Segment(0, 2, ((0, 2),)), Segment(2, 4, ((0, 4),)), Segment(4, 6, ((0, 6),))]
    noisy = [
        Segment(6, 8, ((6, 8),)),
        Segment(8, 10, ((0, 2), (8, 10))),
        Segment(10, 12, ((0, 4), (10, 12))),
    ]
    assert segments(tokens, tokens) == clean + noisy
    assert segments(traced(tokens), tokens) is None
    assert segments(*cached()) is None  # samples differ
    many = grid(129, 1, 1, chunk_frames=1)
    assert segments(many, many) is None


def test_a_named_implementation_runs_or_raises():
    q, k, v = arrays(6, 6)
    assert select_implementation(q, k, v) == (
        "xla" if jax.default_backend() == "cpu" else select_implementation(q, k, v)
    )
    assert select_implementation(q, k, v, implementation="reference") == "reference"
    with pytest.raises(Unsupported, match="cudnn"):
        attention(q, k, v, implementation="cudnn")
    with pytest.raises(ValueError, match="choose from"):
        attention(q, k, v, implementation="flash")
    with pytest.raises(Unsupported, match="cudnn"):
        attention_with_lse(q, k, v, implementation="cudnn")


def test_tokens_must_fit_the_arrays():
    q, k, v = arrays(6, 6)
    tokens = grid(6, 1, 1, chunk_frames=6)
    with pytest.raises(ValueError, match="or for neither"):
        attention(q, k, v, tokens)
    with pytest.raises(ValueError, match="3 key tokens for 6 key rows"):
        attention(q, k, v, tokens, grid(3, 1, 1, chunk_frames=3))
    with pytest.raises(ValueError, match="tokens of 3 samples, not 2"):
        batch = make(np.zeros((3, 6, 3), np.int32), 0, False)
        attention(q, k, v, batch, batch)


@pytest.mark.gpu
def test_cudnn_equals_reference():
    for name in ("bidirectional", "causal", "teacher forcing", "cached"):
        q_tokens, k_tokens = layouts()[name]
        q, k, v = arrays(len(q_tokens), len(k_tokens), width=64, dtype=jnp.bfloat16)
        assert select_implementation(q, k, v, q_tokens, k_tokens) == "cudnn"
        got, want = (
            attention(q, k, v, q_tokens, k_tokens, implementation=i).astype(jnp.float32)
            for i in ("cudnn", "reference")
        )
        chex.assert_trees_all_close(got, want, rtol=2e-2, atol=2e-2)
