"""The product kernel: results and races in the interpreter, compilation without a GPU."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.catalog import kernels_of
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.nvfp4 import products, quantize
from pallas_kernels.nvfp4.format import (
    CODE_DTYPE,
    NVFP4,
    SCALE_DTYPE,
    amax_divisor,
    with_scale_layout,
)
from pallas_kernels.nvfp4.mosaic import matmul as op
from pallas_kernels.nvfp4.mosaic import matmul_tiling as tilings
from pallas_kernels.nvfp4.mosaic import records
from pallas_kernels.nvfp4.mosaic.matmul_kernel import tile_of
from pallas_kernels.nvfp4.mosaic.matmul_tiling import Problem, Tiling
from tests.pallas_kernels import deviceless
from tests.pallas_kernels.interpreter import SIMULATED, block_scaled_products, no_races

SINGLE_BLOCK = ("nvfp4_matmul", "most tokens", "rank 16, single blocks")
WIDE = Tiling(256, False, stages=3, clusters=1)
NARROW = Tiling(128, False, stages=2, clusters=2, band=2)


def exact(seed: int, rows: int, k: int) -> NVFP4:
    """Random codes and scales whose products have exact float32 sums in any order."""
    codes, scales = jax.random.split(jax.random.key(seed))
    codes = jax.random.bits(codes, (rows, k // 2), jnp.uint8)
    codes = jax.lax.bitcast_convert_type(codes, CODE_DTYPE).reshape(rows, k)
    scales = 2.0 ** jax.random.randint(scales, (rows, k // 16), -2, 3)
    return NVFP4(codes, scales.astype(SCALE_DTYPE), jnp.float32(amax_divisor("mse") / 2), "mse")


def random_integers(seed: int, *shape: int) -> jax.Array:
    """Small random integers in bfloat16."""
    return jax.random.randint(jax.random.key(seed), shape, -8, 9).astype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    tiling: Tiling | None = None
    bias: bool = True
    rank: int = 0
    dtype: type = jnp.bfloat16


CASES = {
    "more steps than stages, shared columns": Case(200, 384, 1280, WIDE),
    "two blocks, low rank, odd sizes": Case(300, 200, 560, NARROW, rank=33),
}
SLOW = {
    "a tile": Case(128, 128, 256, bias=False),
    "less than a tile": Case(5, 72, 48, rank=5, dtype=jnp.float32),
    "three tiles in turn": Case(160, 640, 512, WIDE, rank=16, dtype=jnp.float32),
    "many narrow tiles": Case(328, 384, 768, NARROW, dtype=jnp.float32),
    "chosen tiling": Case(512, 512, 512),
}


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=name) for name, case in CASES.items()),
        *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()),
    ],
)
def test_it_equals_the_oracle(case):
    a, b = exact(0, case.m, case.k), exact(1, case.n, case.k)
    bias = jax.random.normal(jax.random.key(2), (case.n,)) if case.bias else None
    pair = None
    if case.rank:
        pair = random_integers(3, case.m, case.rank), random_integers(4, case.rank, case.n)
    options = {"bias": bias, "low_rank": pair, "out_dtype": case.dtype}
    with block_scaled_products(), no_races(kernels=1):
        got = op.matmul(a, b, tiling=case.tiling, interpret=SIMULATED, **options)
    np.testing.assert_array_equal(got, products.reference(a, b, **options))


def test_random_values_swizzled_scales_and_a_float32_branch():
    a, b = (
        quantize(jax.random.normal(jax.random.key(i), shape) * size, rule=rule)
        for i, (shape, size, rule) in enumerate(
            (((64, 256), 3.7, "abs_max"), ((128, 256), 0.02, "static_4"))
        )
    )
    left = jax.random.normal(jax.random.key(2), (64, 8))
    right = jax.random.normal(jax.random.key(3), (8, 128)).astype(jnp.bfloat16)
    with block_scaled_products(), no_races(kernels=1):
        got = op.matmul(
            a,
            with_scale_layout(b, "tiles"),
            low_rank=(left, right),
            out_dtype=jnp.float32,
            interpret=SIMULATED,
        )
    want = products.reference(a, b, out_dtype=jnp.float32) + left @ right.astype(jnp.float32)
    bound = 2.0**-8 * np.abs(left) @ np.abs(right.astype(jnp.float32)) + 1e-5
    assert (np.abs(got - want) < bound).all()


def test_a_zero_matrix_leaves_only_the_branch():
    """The kernel's operands: with a branch zero scales and a factor of 1, else a factor of 0."""
    a, b = exact(0, 16, 32), exact(1, 64, 32)
    a = dataclasses.replace(a, amax=jnp.float32(0))
    pair = random_integers(3, 16, 16), random_integers(4, 16, 64)
    problem = Problem(16, 64, 256, rank=16)
    operands = op.kernel_operands(problem, a, b, None, pair)
    assert not np.asarray(operands[2], np.float32).any() and operands[4] == 1
    np.testing.assert_array_equal(operands[5], pair[0])
    alone = op.kernel_operands(dataclasses.replace(problem, rank=0), a, b, None, None)
    assert alone[4] == 0 and np.asarray(alone[2], np.float32).any()


@pytest.mark.parametrize("rank", [0, 16, 128])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_tiling_fits_the_chip(rank, itemsize):
    problem = Problem(7040, 3072, 14336, rank=rank, bias=True, itemsize=itemsize)
    for pair, columns in itertools.product((False, True), tilings.TILE_WIDTHS):
        tiling = tilings.fit(problem, columns, pair, 152)
        assert tilings.shared_bytes(problem, tiling) <= tilings.SHARED_BYTES
        scales = tilings.SCALE_SLOTS * 4 * (4 + tiling.scale_rows // 32)
        assert tiling.second + tiling.columns + scales <= tilings.TENSOR_COLUMNS
        assert tiling.clusters * tiling.blocks <= 152
    chosen = tilings.choose(problem, multiprocessors=152)
    assert chosen.collective and chosen.columns == 256 and chosen.stages >= 3
    single = tilings.choose(problem, multiprocessors=152, collective=False)
    assert not single.collective and single.stages >= 3


@pytest.mark.parametrize(("down", "across", "band"), [(1, 3, 8), (7, 5, 8), (28, 12, 8), (9, 2, 4)])
def test_the_schedule_covers_every_tile(down, across, band):
    indices = jnp.arange(down * across, dtype=jnp.int32)
    row, column = jax.jit(jax.vmap(lambda i: tile_of(i, down, across, band)))(indices)
    tiles = set(zip(row.tolist(), column.tolist(), strict=True))
    assert tiles == set(itertools.product(range(down), range(across)))


A, B = exact(0, 32, 64), exact(1, 128, 64)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (A, exact(1, 128, 32), {}, "a has 64 columns, b has 32"),
        (A, B, {"out_dtype": jnp.float16}, "must be bfloat16 or float32, got float16"),
        (A, B, {"bias": jnp.ones(32)}, r"bias must have shape \(128,\), got \(32,\)"),
        (A, B, {"low_rank": (jnp.ones((32, 8)), jnp.ones((9, 128)))}, r"be \[m, r\] and \[r, n"),
        (A, B, {"low_rank": (jnp.ones((32, 8)), jnp.ones((8, 64)))}, "be 32x128, got 32x64"),
        (A, B, {"low_rank": (jnp.ones((32, 200)), jnp.ones((200, 128)))}, "<= 128, got 200; add"),
        (jax.tree.map(lambda x: x[None], A), B, {}, "map over them, or flatten"),
        (A, B, {"collective": True}, "does not support pairs"),
    ],
)
def test_unsupported_arguments_are_refused(a, b, options, message):
    with pytest.raises(Unsupported, match=message):
        op.matmul(a, b, interpret=SIMULATED, **options)


def test_it_is_refused_without_a_gpu_or_with_a_bad_tiling():
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has a GPU")
    with pytest.raises(Unsupported, match="needs an NVIDIA GPU"):
        op.matmul(A, B)
    with pytest.raises(ValueError, match=r"columns must be one of .*, got columns=64"):
        Tiling(64, False, stages=2, clusters=1)


@pytest.mark.skipif(deviceless.refusal() is not None, reason=f"{deviceless.refusal()}")
@pytest.mark.parametrize("which", ["catalog", pytest.param("shapes", marks=pytest.mark.slow)])
def test_it_compiles_onto_block_scaled_tensor_cores_without_spills(which):
    script = pathlib.Path(__file__).with_name("compile_matmul.py")
    root = str(script.parents[3])
    done = subprocess.run(
        [sys.executable, str(script), "gb200", which],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = json.loads(done.stdout.splitlines()[-1])
    assert kernels.keys() >= {kernel.name for kernel in kernels_of("matmul")} or which == "shapes"
    for name, kernel in kernels.items():
        assert kernel["architecture"] == "sm_100a" and kernel["spilled_bytes"] == 0, name
        assert 0 < kernel["shared_bytes"] <= deviceless.SHARED_MEMORY, name
        assert 0 < kernel["tensor_columns"] <= deviceless.TENSOR_COLUMNS, name
        # A step issues four products of 64 values each, for each of the two slots of scales.
        pattern = records.SINGLE if name in SINGLE_BLOCK else records.PAIRS
        counts = kernel["instructions"]
        assert sum(n for i, n in counts.items() if re.fullmatch(pattern, i)) >= 8, name
        assert any(i.startswith("UTCHMMA") for i in counts) == ("rank" in name), name
