"""The sharding table: it is complete, and applies to parameters, moments and the 5B model."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from longlive_jax.models.params import abstract
from longlive_jax.models.variants import variant
from longlive_jax.models.wan import DiT
from longlive_jax.parallel import rules
from longlive_jax.parallel.mesh import SHARDS, MeshSpec, make_mesh


def test_only_vectors_of_the_5b_model_are_replicated():
    _, shapes = abstract(lambda: DiT(variant("wan2_2_ti2v_5b")["dit"], rngs=nnx.Rngs(0)))
    specs = rules.specs_for(rules.DIT, shapes)
    mesh = jax.sharding.AbstractMesh((1, 8, 4), ("data", "fsdp", "sp"))
    rules.check_divides(mesh, specs, shapes)
    leaves = zip(
        jax.tree.leaves(shapes), jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)),
        strict=True,
    )  # fmt: skip
    sizes = [(leaf.size, SHARDS in spec) for leaf, spec in leaves]
    replicated = sum(size for size, is_sharded in sizes if not is_sharded)
    assert replicated < 2e-3 * sum(size for size, _ in sizes)


def test_every_path_needs_a_rule():
    tree = {"blocks": {"self_attn": {"q": {"kernel": 0, "lora_a": 0}}}, "new": {"table": 0}}
    with pytest.raises(ValueError, match="blocks/self_attn/q/lora_a, new/table"):
        rules.specs_for(rules.DIT, tree)


def test_an_axis_that_does_not_divide_is_named():
    mesh = make_mesh(MeshSpec(fsdp=2, sp=4))
    table = [("w", P(None, SHARDS))]
    with pytest.raises(ValueError, match=r"w \(3, 12\): an axis of 12 does not split into 8"):
        rules.init_sharded(lambda key: {"w": jnp.ones((3, 12))}, jax.random.key(0), mesh, table)


def test_parameters_are_initialised_sharded_and_moments_follow():
    mesh = make_mesh(MeshSpec(data=2, fsdp=2, sp=2))
    table = [("w", P(None, SHARDS)), ("b", P())]
    init = lambda key: {"w": jax.random.normal(key, (4, 16)), "b": jnp.zeros(16)}  # noqa: E731
    params, specs = rules.init_sharded(init, jax.random.key(0), mesh, table)
    assert {s.data.shape for s in params["w"].addressable_shards} == {(4, 4)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    moment_shardings = rules.shardings(mesh, rules.moment_specs(tx, params, specs))
    state = jax.jit(tx.init, out_shardings=moment_shardings)(params)
    moments = optax.tree.get(state, "nu")
    for name, leaf in moments.items():
        assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim)
    assert optax.tree.get(state, "count").sharding.is_fully_replicated
