"""What a gradient recomputes of every layer under each rematerialization policy."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.layout import teacher_forcing
from longlive_jax.models.params import params_of, with_params
from longlive_jax.models.wan import DiT, DiTConfig
from pallas_kernels.attention import attention, blocked, make_attention, xla
from pallas_kernels.attention.segmented import FusedKernel, attend_batched
from pallas_kernels.attention.segments import segments
from tests.pallas_kernels.fused_kernel import DENSE
from tests.tiny import activate_outputs

CFG = DiTConfig(
    dim=64, ffn_dim=64, freq_dim=8, text_dim=16, text_len=8, heads=4, layers=2, in_channels=4,
    out_channels=4,
)  # fmt: skip
TOKENS = teacher_forcing(4, 2, 2, chunk_frames=2)
ATTENTION_CALLS = {"none": 1, "attention_saved": 1, "everything": 2}
"""Forward passes of self-attention in the program of a gradient."""


def marked_forward(q, k, v):
    """`DENSE.forward` with an operation that nothing else in the program has."""
    out, lse = DENSE.forward(q, k, v)
    return jax.lax.erf_inv(jnp.tanh(out)), lse


def gradient(attend, remat):
    """(params) -> gradient of a scalar of the velocity, and params."""
    dit = DiT(CFG, rngs=nnx.Rngs(0))
    graphdef, params = nnx.graphdef(dit), activate_outputs(params_of(dit))

    def total(params):
        model = with_params(graphdef, params)
        velocity, _ = model(
            jnp.sin(jnp.arange(512.0)).reshape(1, 8, 4, 4, 4),
            jnp.full((1, 8), 500.0),
            model.embed_text(jnp.ones((1, 4, 8, 16)), streams=1),
            TOKENS,
            attend=attend,
            attend_text=partial(attention, implementation="reference"),
            noisy_from=4,
            remat=remat,
        )
        return jnp.sum(velocity**2)

    return jax.grad(total), params


def fused(kernel):
    pieces = tuple(segments(TOKENS, TOKENS))
    return lambda q, k, v, *_: attend_batched(kernel, pieces, q, k, v)


@pytest.mark.parametrize("remat", ATTENTION_CALLS)
def test_attention_runs_forward_once_if_it_is_saved(remat):
    marked = fused(FusedKernel(marked_forward, DENSE.backward))
    function, params = gradient(marked, remat)
    text = jax.jit(function).lower(params).as_text()
    batches = 2  # clean and noisy queries of a chunk run as one call
    assert text.count("erf_inv") == ATTENTION_CALLS[remat] * batches


@pytest.mark.parametrize("attend", ["fused", "blocked"])
def test_gradients_do_not_depend_on_the_policy(attend, monkeypatch):
    monkeypatch.setattr(xla, "DENSE_BYTES", 0)
    monkeypatch.setattr(blocked, "MAX_BLOCK", 8)
    traced = jax.tree.map(jnp.asarray, TOKENS)
    functions = {"fused": fused(DENSE), "blocked": make_attention(traced, traced)}
    results = []
    for remat in ATTENTION_CALLS if attend == "fused" else ("none", "attention_saved"):
        function, params = gradient(functions[attend], remat)
        results.append(jax.jit(function)(params))
    for other in results[1:]:
        chex.assert_trees_all_close(other, results[0], rtol=1e-5, atol=1e-6)


def test_saved_arrays_are_the_output_and_the_log_sum_exp():
    """What crosses from the forward to the backward scan, beside inputs and parameters."""
    function, params = gradient(fused(DENSE), "attention_saved")
    everything, _ = gradient(fused(DENSE), "everything")

    def saved(function):
        scans = [e for e in jax.make_jaxpr(function)(params).eqns if e.primitive.name == "scan"]
        return sorted(np.shape(x.aval) for x in scans[0].outvars)

    more = saved(function)
    for shape in saved(everything):
        more.remove(shape)
    length = len(TOKENS)
    assert sorted(more) == sorted([(2, 1, length, 4, 16), (2, 1, 4, length)])
