"""The kernels: numbers and races in the interpreter, compilation without the chip."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.layout import grid, teacher_forcing, windowed
from pallas_kernels.attention import attention, reference
from pallas_kernels.attention.mosaic import blackwell_forward, hopper_forward, op
from pallas_kernels.attention.mosaic.columns import MaskColumns, mask_columns, seen
from pallas_kernels.attention.tilemap import pad_tokens, tile_maps
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.tokens import concat, visible
from tests.pallas_kernels import deviceless

CUTS = np.array([False, False, True, False])
RANKS = [grid(2, 4, 9, chunk=1, start=2 * r, noisy=noisy) for r in range(2) for noisy in (0, 1)]
QUICK = ("teacher forcing", "window and sinks")  # the others take a minute each
LAYOUTS = {
    "teacher forcing": lambda: teacher_forcing(2, 9, 10, chunk=1),
    "ranks": lambda: concat(*RANKS),
    "block-causal": lambda: grid(5, 8, 8, chunk=2),
    "one chunk": lambda: grid(3, 8, 8, chunk=3),
    "window and sinks": lambda: windowed(
        teacher_forcing(4, 4, 6, chunk=1), jnp.asarray(CUTS), window=3, global_sinks=1
    ),
    "cuts differ": lambda: windowed(
        teacher_forcing(4, 4, 6, chunk=1),
        jnp.stack([jnp.asarray(CUTS), jnp.zeros(4, bool)]), window=3, global_sinks=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_columns_say_what_is_visible(name):
    tokens = pad_tokens(LAYOUTS[name](), 32)
    columns = mask_columns(tokens, tokens)
    got = seen(lambda i: columns.query[:, i, :, None], columns.key[:, None, :])
    np.testing.assert_array_equal(got, visible(tokens, tokens))


def test_columns_of_a_window_that_begins_after_a_clean_chunk():
    tokens = pad_tokens(grid(4, 2, 2, chunk=1), 4).replace(since=jnp.full((1, 16), 3))
    columns: MaskColumns = mask_columns(tokens, tokens)
    got = seen(lambda i: columns.query[:, i, :, None], columns.key[:, None, :])
    np.testing.assert_array_equal(got, visible(tokens, tokens))


def distance(got, want) -> float:
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def races() -> bool:
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(
    "name", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in LAYOUTS]
)
def test_values_and_gradients_are_those_of_the_oracle(name):
    check_against_the_oracle(
        LAYOUTS[name](), heads=1, width=64, interpret=plgpu.InterpretGPUParams(detect_races=True)
    )
    assert not races()


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("width", op.WIDTHS)
def test_values_and_gradients_on_a_gpu(name, width):
    probe = jax.ShapeDtypeStruct((1, 1, 1, width), jnp.bfloat16)
    if why := op.refusal(probe):
        pytest.skip(why)
    check_against_the_oracle(LAYOUTS[name](), heads=3, width=width)


def check_against_the_oracle(tokens, *, heads: int, width: int, interpret=None):
    batch = tokens.chunk.shape[0] if tokens.chunk.ndim > 1 else 1
    shape = (batch, len(tokens), heads, width)
    *arguments, grad = (
        jax.random.normal(key, shape).astype(jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0), 4)
    )
    found, pull = jax.vjp(
        lambda *qkv: op.attend(*qkv, tokens, tokens, interpret=interpret), *arguments
    )
    got = (found, *pull(grad))
    exact = [x.astype(jnp.float32) for x in arguments]
    found, pull = jax.vjp(lambda *qkv: reference.attend(*qkv, tokens, tokens), *exact)
    want = (found, *pull(grad.astype(jnp.float32)))
    assert [distance(a, b) < 5e-3 for a, b in zip(got, want, strict=True)] == [True] * 4


def test_a_forward_pass_of_unequal_lengths_and_its_normaliser():
    keys = grid(3, 6, 9, chunk=1)
    queries = grid(1, 6, 9, chunk=1, start=2, noisy=True)
    k_tokens = concat(keys, queries)
    q, k = (
        jax.random.normal(jax.random.key(i), (1, len(t), 1, 64)).astype(jnp.bfloat16)
        for i, t in enumerate((queries, k_tokens))
    )
    mask = op.layout(queries, k_tokens)
    out, lse = op.attend_layout(q, k, k, mask, interpret=plgpu.InterpretGPUParams())
    want = reference.attend(*(x.astype(jnp.float32) for x in (q, k, k)), queries, k_tokens)
    assert distance(out, want) < 5e-3
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32) / 8
    logits = jnp.where(visible(queries, k_tokens), logits, -jnp.inf)
    np.testing.assert_allclose(lse, jax.nn.logsumexp(logits, axis=-1), atol=2e-3)


@pytest.mark.parametrize("name", QUICK)
def test_the_blackwell_forward_pass(name):
    tokens = LAYOUTS[name]()
    size = blackwell_forward.ForwardTiles()
    padded = pad_tokens(tokens, size.rows)
    shape = (1, padded.chunk.shape[1], 1, 64)
    arguments = [
        jax.random.normal(key, shape).astype(jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0), 3)
    ]
    tiles, _ = tile_maps(padded, padded, q_tile=size.rows, k_tile=size.keys)
    simulated = plgpu.InterpretGPUParams(detect_races=True)
    columns = mask_columns(padded, padded)
    out, lse = blackwell_forward.forward(*arguments, columns, tiles, size, interpret=simulated)
    assert not races()
    want = reference.attend(*(x.astype(jnp.float32) for x in arguments), padded, padded)
    assert distance(out, want) < 5e-3
    nothing = np.asarray(padded.chunk[0] < 0)
    np.testing.assert_array_equal(np.asarray(lse[0, 0]) >= -hopper_forward.MASKED, nothing)
    assert not np.asarray(out[0, nothing]).any()


def test_it_refuses_what_it_cannot_run():
    tokens = grid(1, 8, 8, chunk=1)
    x = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has a GPU")
    with pytest.raises(Unsupported, match="needs an NVIDIA GPU"):
        attention(x, x, x, tokens, tokens, implementation="mosaic")


@pytest.mark.skipif(deviceless.refusal() is not None, reason=f"{deviceless.refusal()}")
@pytest.mark.parametrize("width", op.WIDTHS)
@pytest.mark.parametrize(
    ("chip", "kernel", "instruction"),
    [
        ("h200", "hopper_forward", "HGMMA"),
        ("h200", "hopper_dq", "HGMMA"),
        ("h200", "hopper_dkv", "HGMMA"),
        ("gb200", "blackwell_forward", "UTCHMMA"),
    ],
)
def test_it_compiles_onto_tensor_cores_without_spills(chip, kernel, instruction, width):
    script = pathlib.Path(__file__).with_name("compile_kernel.py")
    command = [sys.executable, str(script), chip, kernel, str(width)]
    root = str(script.parents[2])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=root, env=_environment(root)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["kernels"] == 1 and said["spilled_bytes"] == 0
    assert said["tensor_core"].get(instruction, 0) >= 8


def _environment(root: str) -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": root}
