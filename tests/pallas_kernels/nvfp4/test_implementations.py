"""The same tests for every implementation: `xla` anywhere, `mosaic` on a Blackwell GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.packed_kv import attention_packed
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.nvfp4 import dequantize, matmul, quantize
from tests.pallas_kernels.nvfp4.test_matmul_mosaic import exact, random_integers
from tests.pallas_kernels.nvfp4.test_mosaic_quantize import array
from tests.pallas_kernels.test_attention_packed import distance, problem

KEY = jax.random.key(7)
FORMS = {
    "static": {"rule": "static_6"},
    "searched": {"rule": "mse"},
    "stochastic": {"rule": "mse", "key": KEY},
    "rotated": {"rule": "mse", "hadamard": True},
    "transposed": {"rule": "mse", "transpose": True},
    "transposed, rotated, stochastic": {
        "rule": "mse", "transpose": True, "hadamard": True, "key": KEY
    },
    "squares": {"rule": "mse", "block_rows": 16},
}  # fmt: skip


@pytest.fixture(params=["xla", pytest.param("mosaic", marks=pytest.mark.gpu)])
def run(request):
    """Calls a function with `implementation`; skips with the reason if that cannot run."""

    def call(function, *arguments, **options):
        try:
            return function(*arguments, **options, implementation=request.param)
        except Unsupported as reason:
            pytest.skip(str(reason))

    return call


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_quantize(run, options):
    """A GPU's division may round a block's scale, or a value, to the neighbouring code."""
    x = array(512, 768)
    got, want = run(quantize, x, **options), quantize(x, **options, implementation="reference")
    np.testing.assert_array_equal(got.amax, want.amax)
    for name in ("codes", "scales"):
        a, b = (np.asarray(getattr(y, name), np.float32) for y in (got, want))
        assert (a != b).mean() < 2e-3, name
    a, b = (dequantize(y, jnp.float32, implementation="reference") for y in (got, want))
    assert distance(a, b) < 1e-2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dequantize(run, dtype):
    a = quantize(array(2, 3, 64, 128), lead=2)
    np.testing.assert_array_equal(
        run(dequantize, a, dtype), dequantize(a, dtype, implementation="reference")
    )


@pytest.mark.parametrize(
    ("m", "n", "k", "rank"),
    [(128, 128, 256, 0), (200, 384, 1280, 0), (300, 200, 560, 33), (2048, 1536, 512, 16)],
)
def test_matmul(run, m, n, k, rank):
    """Sums are exact in float32. The last case is large enough for pairs of thread blocks."""
    a, b = exact(0, m, k), exact(1, n, k)
    pair = (random_integers(3, m, rank), random_integers(4, rank, n)) if rank else None
    options = {"bias": jax.random.normal(KEY, (n,)), "low_rank": pair}
    got, want = run(matmul, a, b, **options), matmul(a, b, **options, implementation="reference")
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_attention(run, width, restored):
    arguments, offset, tokens = problem(batch=2, slots=3, tokens=256, own=320, width=width)
    options = {"offset": offset if restored else None}
    got = run(attention_packed, *arguments, *tokens, **options)
    want = attention_packed(*arguments, *tokens, **options, implementation="reference")
    assert distance(got, want) < 1e-2
