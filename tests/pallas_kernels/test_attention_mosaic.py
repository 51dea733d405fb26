"""The attention kernels: results and races in the interpreter, compilation without a GPU."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.layout import grid, teacher_forcing, windowed
from pallas_kernels.attention import attention, reference
from pallas_kernels.attention.mosaic import op
from pallas_kernels.attention.mosaic.columns import MaskColumns, code_mask, mask_columns
from pallas_kernels.attention.mosaic.targets import BLACKWELL, HOPPER, Target
from pallas_kernels.attention.tilemap import pad_tokens
from pallas_kernels.dispatch import Unsupported, assumed_device
from pallas_kernels.tokens import EMPTY, concat, make, visible
from tests.pallas_kernels import deviceless
from tests.pallas_kernels.interpreter import SIMULATED, no_races

CUTS = np.array([False, False, True, False])


def balanced(frames: int):
    """Balanced order: clean and noisy frames of one of two ranks, then of the other."""
    parts = itertools.product(range(2), (False, True))
    return concat(
        *(grid(frames, 4, 9, chunk_frames=1, start=frames * r, noisy=n) for r, n in parts)
    )


LAYOUTS = {
    "teacher forcing": lambda: teacher_forcing(2, 9, 10, chunk_frames=1),
    "ranks": lambda: balanced(2),
    "block-causal": lambda: grid(5, 8, 8, chunk_frames=2),
    "one chunk": lambda: grid(3, 8, 8, chunk_frames=3),
    "window and sinks": lambda: windowed(
        teacher_forcing(4, 4, 6, chunk_frames=1), jnp.asarray(CUTS), window=3, global_sinks=1
    ),
    "cuts differ": lambda: windowed(
        teacher_forcing(4, 4, 6, chunk_frames=1),
        jnp.stack([jnp.asarray(CUTS), jnp.zeros(4, bool)]), window=3, global_sinks=1,
    ),
}  # fmt: skip
SMALL = {
    "few ranks": lambda: balanced(1),
    "two chunks": lambda: grid(4, 5, 7, chunk_frames=2),
    "one small chunk": lambda: grid(2, 5, 12, chunk_frames=2),
}
"""Layouts of a tile or two, which the interpreter can run in every run of the tests."""
QUICK = ("teacher forcing", "window and sinks", *SMALL)


@pytest.mark.parametrize("name", LAYOUTS)
def test_mask_columns_equal_the_mask(name):
    tokens = pad_tokens(LAYOUTS[name](), 32)
    columns = mask_columns(tokens, tokens)
    got = code_mask(lambda i: columns.query[:, i, :, None], columns.key[:, None, :])
    np.testing.assert_array_equal(got, visible(tokens, tokens))


def test_mask_columns_of_a_window_that_starts_after_a_clean_chunk():
    tokens = pad_tokens(grid(4, 2, 2, chunk_frames=1), 4).replace(window_start=jnp.full((1, 16), 3))
    columns: MaskColumns = mask_columns(tokens, tokens)
    got = code_mask(lambda i: columns.query[:, i, :, None], columns.key[:, None, :])
    np.testing.assert_array_equal(got, visible(tokens, tokens))


def distance(got, want) -> float:
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("target", (HOPPER, BLACKWELL), ids=lambda target: target.name)
@pytest.mark.parametrize(
    "name",
    [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in LAYOUTS | SMALL],
)
def test_values_and_gradients_are_those_of_the_oracle(name, target):
    tokens = (LAYOUTS | SMALL)[name]()
    with no_races(kernels=3):  # the output, dq, dk and dv
        check_against_the_oracle(tokens, heads=1, width=64, target=target, interpret=SIMULATED)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("width", op.WIDTHS)
def test_values_and_gradients_on_a_gpu(name, width):
    probe = jax.ShapeDtypeStruct((1, 1, 1, width), jnp.bfloat16)
    if why := op.refusal(probe):
        pytest.skip(why)
    check_against_the_oracle(LAYOUTS[name](), heads=3, width=width)


def check_against_the_oracle(
    tokens, *, heads: int, width: int, target: Target | None = None, interpret=None
):
    """Output, log-sum-exp, and the gradients of both in all arguments."""
    batch = tokens.chunk_index.shape[0] if tokens.chunk_index.ndim > 1 else 1
    shape = (batch, len(tokens), heads, width)
    *arguments, grad = (
        jax.random.normal(key, shape).astype(jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0), 4)
    )
    d_lse = jax.random.normal(jax.random.key(1), shape[:-1])
    mask = op.make_mask(tokens, tokens, target=target)
    out, pull = jax.vjp(lambda *qkv: op.attend_mask(*qkv, mask, interpret=interpret), *arguments)
    got = (*out, *pull((grad, d_lse)))
    exact = [x.astype(jnp.float32) for x in arguments]
    out, pull = jax.vjp(lambda *qkv: reference.attend_with_lse(*qkv, tokens, tokens), *exact)
    want = (*out, *pull((grad.astype(jnp.float32), d_lse)))
    assert [distance(a, b) < 5e-3 for a, b in zip(got, want, strict=True)] == [True] * 5


@pytest.mark.parametrize("target", (HOPPER, BLACKWELL), ids=lambda target: target.name)
def test_odd_and_unequal_lengths_and_fully_masked_queries(target):
    keys = grid(3, 7, 9, chunk_frames=1)
    masked = make(np.zeros((5, 3), np.int32), EMPTY, False)
    queries = concat(grid(1, 7, 9, chunk_frames=1, start=2, noisy=True), masked)
    k_tokens = concat(keys, queries)
    assert (len(queries), len(k_tokens)) == (68, 257)
    q, k = (
        jax.random.normal(jax.random.key(i), (1, len(t), 1, 64)).astype(jnp.bfloat16)
        for i, t in enumerate((queries, k_tokens))
    )
    mask = op.make_mask(queries, k_tokens, target=target)
    with no_races(kernels=1):
        out, lse = op.attend_mask(q, k, k, mask, interpret=SIMULATED)
    exact = (x.astype(jnp.float32) for x in (q, k, k))
    want, want_lse = reference.attend_with_lse(*exact, queries, k_tokens)
    assert distance(out, want) < 5e-3
    np.testing.assert_allclose(lse, want_lse, atol=2e-3)
    assert not np.asarray(out[0, -5:]).any() and np.isneginf(lse[0, -5:]).all()


@pytest.mark.parametrize("target", (HOPPER, BLACKWELL), ids=lambda target: target.name)
def test_a_tile_of_queries_that_sees_no_key_is_zero(target):
    chunk = np.repeat([0, EMPTY], target.rows)
    queries = make(np.zeros((len(chunk), 3), np.int32), chunk, False)
    keys = make(np.zeros((64, 3), np.int32), 0, False)
    q, k = (
        jax.random.normal(jax.random.key(i), (1, len(t), 1, 64)).astype(jnp.bfloat16)
        for i, t in enumerate((queries, keys))
    )
    mask = op.make_mask(queries, keys, target=target)
    with no_races(kernels=1):
        out, lse = op.attend_mask(q, k, k, mask, interpret=SIMULATED)
    blind = chunk == EMPTY
    assert not np.asarray(out[0, blind]).any() and np.isneginf(lse[0, blind]).all()
    exact = (x.astype(jnp.float32) for x in (q, k, k))
    want, _ = reference.attend_with_lse(*exact, queries, keys)
    assert distance(out, want) < 5e-3


@pytest.mark.parametrize(("capability", "target"), [("9.0", HOPPER), ("10.0", BLACKWELL)])
def test_the_device_selects_the_kernels(capability, target):
    tokens = grid(1, 8, 8, chunk_frames=1)
    with assumed_device("gpu", capability):
        assert op.make_mask(tokens, tokens).target is target
        assert op.refusal(jax.ShapeDtypeStruct((1, 64, 1, 128), jnp.bfloat16)) is None


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "message"),
    [
        ("8.0", "bfloat16", 64, "this is compute capability 8.0"),
        ("9.0", "float32", 64, "arguments must be bfloat16, got float32"),
        ("10.0", "bfloat16", 96, "the head width must be 64 or 128, got 96"),
    ],
)
def test_unsupported_arguments_are_refused_with_a_reason(capability, dtype, width, message):
    x = jnp.ones((1, 64, 1, width), dtype)
    with assumed_device("gpu", capability), pytest.raises(Unsupported, match=message):
        attention(x, x, x, implementation="mosaic")


def test_it_is_refused_without_a_gpu():
    tokens = grid(1, 8, 8, chunk_frames=1)
    x = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has a GPU")
    with pytest.raises(Unsupported, match="needs an NVIDIA GPU"):
        attention(x, x, x, tokens, tokens, implementation="mosaic")


@pytest.mark.skipif(deviceless.refusal() is not None, reason=f"{deviceless.refusal()}")
@pytest.mark.parametrize("width", op.WIDTHS)
@pytest.mark.parametrize(
    ("chip", "architecture", "instruction"),
    [("h200", "sm_90a", "HGMMA"), ("gb200", "sm_100a", "UTCHMMA")],
)
def test_it_compiles_onto_tensor_cores_without_spills(chip, architecture, instruction, width):
    script = pathlib.Path(__file__).with_name("compile_kernel.py")
    root = str(script.parents[2])
    done = subprocess.run(
        [sys.executable, str(script), chip, str(width)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = json.loads(done.stdout.splitlines()[-1])
    assert len(kernels) == 3  # the output, dq, dk and dv
    for kernel in kernels:
        assert kernel["architecture"] == architecture and kernel["spilled_bytes"] == 0
        assert kernel["tensor_core"].get(instruction, 0) >= 12
        assert 0 < kernel["shared_bytes"] <= deviceless.SHARED_MEMORY
        assert kernel["tensor_columns"] <= deviceless.TENSOR_COLUMNS
    if chip == "h200":  # all exponentials of a step run while the tensor core works
        assert [kernel["beside_products"] for kernel in kernels] == [64 + 2, 32, 32]
        assert not any(kernel["serialized"] for kernel in kernels)
