"""The balanced order, and Ulysses around every implementation of attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from longlive_jax import layout
from longlive_jax.parallel.balanced import interleave_shards
from longlive_jax.parallel.mesh import AXES, SP, MeshSpec, make_mesh
from longlive_jax.parallel.ulysses import ulysses
from pallas_kernels.attention import attention

NUM_SHARDS = 4


def test_shards_of_context_and_target_alternate():
    context, target = jnp.arange(8)[None], 100 + jnp.arange(12)[None]
    interleaved = interleave_shards(context, target, NUM_SHARDS)
    np.testing.assert_array_equal(interleaved[0, :10], [0, 1, 100, 101, 102, 2, 3, 103, 104, 105])
    with pytest.raises(ValueError, match="8 entries do not split into 3"):
        interleave_shards(context, target, 3)


def test_the_balanced_order_needs_no_communication():
    mesh = make_mesh(MeshSpec(data=2, sp=NUM_SHARDS))
    sharding = jax.sharding.NamedSharding(mesh, P("data", SP))
    x = jax.device_put(jnp.zeros((2, 16, 3)), sharding)
    interleave = functools.partial(interleave_shards, num_shards=NUM_SHARDS)
    text = jax.jit(interleave, out_shardings=sharding).lower(x, x).compile().as_text()
    assert not any(f" {op}" in text for op in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_ulysses_equals_one_device_in_values_and_gradients(implementation):
    """With teacher forcing in the balanced order, whose mask comes from the tokens."""
    mesh = make_mesh(MeshSpec(data=1, fsdp=2, sp=NUM_SHARDS))
    attend = functools.partial(attention, implementation=implementation)
    tokens = layout.teacher_forcing(8, 1, 2, chunk_frames=2)
    half = len(tokens) // 2
    clean = jnp.arange(half)[None]
    order = np.asarray(interleave_shards(clean, half + clean, NUM_SHARDS)[0])
    tokens = jax.tree.map(lambda x: np.asarray(x)[order], tokens)
    shape = (2, len(tokens), 8, 16)
    q, k, v = (jax.random.normal(jax.random.key(i), shape) for i in range(3))
    acts = P(("data", "fsdp"), SP)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=acts, out_specs=acts, check_vma=False)
    def sharded(q, k, v):
        return ulysses(attend)(q, k, v, tokens, tokens)

    def value_and_grad(attend):
        return jax.jit(jax.value_and_grad(lambda args: jnp.sum(jnp.sin(attend(*args)))))

    got, got_grads = value_and_grad(sharded)((q, k, v))
    single = value_and_grad(lambda q, k, v: attend(q, k, v, tokens, tokens))
    want, want_grads = single((q, k, v))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(got_grad, want_grad, atol=2e-6)
    assert mesh.axis_names == AXES
