"""Products without a custom kernel: dequantized, in bfloat16, and with XLA's block-scaled op."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nvfp4 import dequantize, matmul, products, quantize

M, N, K, RANK = 24, 40, 96, 8
IMPLEMENTATIONS = ("reference", "xla")


def operands(rules=("mse", "static_6")):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((M, K), (N, K)))
    low_rank = (rng.standard_normal(shape) for shape in ((M, RANK), (RANK, N)))
    extra = {
        "bias": jnp.asarray(rng.standard_normal(N), jnp.float32),
        "low_rank": tuple(jnp.asarray(part, jnp.bfloat16) for part in low_rank),
    }
    return quantize(x, rule=rules[0]), quantize(w, rule=rules[1], block_rows=16), extra


def exact(a, b, bias=None, low_rank=None):
    x, y = (np.asarray(dequantize(c, jnp.float32), np.float64) for c in (a, b))
    out = x @ y.T
    if low_rank is not None:
        out += np.asarray(low_rank[0], np.float64) @ np.asarray(low_rank[1], np.float64)
    return out if bias is None else out + np.asarray(bias, np.float64)


@pytest.mark.parametrize("names", [(), ("bias",), ("bias", "low_rank")], ids="-".join)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_product_of_dequantized_values(implementation, names):
    a, b, extra = operands()
    extra = {name: extra[name] for name in names}
    want = exact(a, b, **extra)
    run = jax.jit(matmul, static_argnames=("implementation", "out_dtype"))
    got = run(a, b, **extra, out_dtype=jnp.float32, implementation=implementation)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    short = run(a, b, **extra, implementation=implementation)
    assert short.dtype == jnp.bfloat16
    np.testing.assert_array_equal(short, got.astype(jnp.bfloat16))


def test_the_block_scaled_product_is_the_same(monkeypatch):
    """The program for a GPU of capability 10.0; here XLA lowers it to plain arithmetic."""
    a, b, extra = operands()
    monkeypatch.setattr(products, "capability", lambda: "10.0")
    got = matmul(a, b, **extra, out_dtype=jnp.float32, implementation="xla")
    np.testing.assert_allclose(got, exact(a, b, **extra), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": lambda a, b: jax.tree.map(lambda x: x[None], b)}, "b must be a matrix"),
        ({"b": lambda a, b: quantize(jnp.ones((N, K + 16)))}, "last axes differ"),
        ({"bias": lambda a, b: jnp.ones(N + 1)}, "bias must have shape"),
        ({"low_rank": lambda a, b: (jnp.ones((M, 4)), jnp.ones((5, N)))}, "low_rank must have"),
    ],
)
def test_operands_that_do_not_match_are_refused(change, message):
    a, b, _ = operands()
    arguments = {"a": a, "b": b} | {name: make(a, b) for name, make in change.items()}
    with pytest.raises(ValueError, match=message):
        matmul(**arguments)
