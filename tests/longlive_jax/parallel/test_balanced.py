"""The balanced order, and Ulysses around every implementation of attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from longlive_jax import layout
from longlive_jax.parallel.balanced import paired
from longlive_jax.parallel.mesh import AXES, SP, MeshSpec, make_mesh
from longlive_jax.parallel.ulysses import ulysses
from pallas_kernels.attention import attention

PARTS = 4


def test_paired_are_the_parts_of_both_side_by_side():
    context, target = jnp.arange(8)[None], 100 + jnp.arange(12)[None]
    both = paired(context, target, PARTS)
    np.testing.assert_array_equal(both[0, :10], [0, 1, 100, 101, 102, 2, 3, 103, 104, 105])
    with pytest.raises(ValueError, match="8 entries do not split into 3"):
        paired(context, target, 3)


def test_the_balanced_order_moves_nothing_between_devices():
    mesh = make_mesh(MeshSpec(data=2, sp=PARTS))
    split = jax.sharding.NamedSharding(mesh, P("data", SP))
    x = jax.device_put(jnp.zeros((2, 16, 3)), split)
    pair = jax.jit(functools.partial(paired, parts=PARTS), out_shardings=split)
    text = pair.lower(x, x).compile().as_text()
    assert not any(f" {op}" in text for op in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_ulysses_equals_one_device_in_values_and_gradients(implementation):
    """Teacher forcing in the balanced order; a mask from the tokens alone."""
    mesh = make_mesh(MeshSpec(data=1, fsdp=2, sp=PARTS))
    attend = functools.partial(attention, implementation=implementation)
    tokens = layout.teacher_forcing(8, 1, 2, chunk_frames=2)
    half = len(tokens) // 2
    order = np.asarray(paired(jnp.arange(half)[None], half + jnp.arange(half)[None], PARTS)[0])
    tokens = jax.tree.map(lambda x: np.asarray(x)[order], tokens)
    shape = (2, len(tokens), 8, 16)
    q, k, v = (jax.random.normal(jax.random.key(i), shape) for i in range(3))
    acts = P(("data", "fsdp"), SP)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=acts, out_specs=acts, check_vma=False)
    def shared(q, k, v):
        return ulysses(attend)(q, k, v, tokens, tokens)

    def measured(attend):
        return jax.jit(jax.value_and_grad(lambda args: jnp.sum(jnp.sin(attend(*args)))))

    got, grads = measured(shared)((q, k, v))
    want, wanted = measured(lambda q, k, v: attend(q, k, v, tokens, tokens))((q, k, v))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for one, other in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    assert mesh.axis_names == AXES
