"""Error recycling over meshes: the same results, nothing moved or held twice, saves that fit."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding

from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.parallel.rules import shardings
from longlive_jax.training.objectives.error_buffer import BufferSpec
from longlive_jax.training.objectives.error_recycling import (
    RecyclingSpec,
    bytes_held,
    init_buffers,
    partition,
)
from tests.longlive_jax.training.recycled import (
    CHUNK,
    LOSS,
    SIZE,
    given,
    one_step,
    place,
    rollout,
    spec_of,
    uniform_mask,
)

LAYOUTS = {
    "by column": {},
    "own groups": {"groups": 2},
    "by chunk": {"by": "chunk", "rows": 5},
    "dealt": {"rows": 4, "buckets": 6, "dealt": True, "replace": "oldest"},
    "alike": {"rows": 1, "replace": "nearest"},
}


@functools.cache
def alone(name):
    return rollout(spec_of(**LAYOUTS[name]))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("by column", (2, 1, 4)),
        ("by column", (1, 4, 2)),
        ("own groups", (2, 1, 4)),
        ("by chunk", (2, 1, 2)),
        ("dealt", (2, 1, 4)),
        ("alike", (2, 2, 1)),
    ],
    ids=str,
)
def test_no_result_depends_on_the_mesh(name, shape):
    spec, sizes = spec_of(**LAYOUTS[name]), MeshSpec(*shape)
    mesh = make_mesh(sizes, jax.devices()[: sizes.size])
    used, buffers = rollout(spec, mesh)
    uniform_mask((used, buffers), alone(name))
    place = NamedSharding(mesh, partition(spec).latent.entries)
    for leaf in jax.tree.leaves((buffers.latent, buffers.noise)):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def compiled(spec, sizes: MeshSpec):
    """The program of a step."""
    mesh = make_mesh(sizes, jax.devices()[: sizes.size])
    held = shardings(mesh, partition(spec))

    def shape(x, where):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    buffers = jax.eval_shape(lambda: init_buffers(spec, (CHUNK, *SIZE)))
    inputs = jax.tree.map(lambda x: shape(x, place(mesh, x)), given(0))
    run = jax.jit(
        functools.partial(one_step, spec, LOSS), donate_argnums=0, out_shardings=(None, held)
    )
    return run.lower(jax.tree.map(shape, buffers, held), *inputs).compile()


def test_positions_by_column_move_nothing_between_sp_ranks():
    program = compiled(spec_of(), MeshSpec(sp=4)).as_text()
    moved = re.findall(
        r"(\S+) = \S+ (all-gather|all-reduce|all-to-all|collective-permute)\(", program
    )
    assert not moved


@pytest.mark.parametrize("groups", [1, 2])
def test_buffers_are_updated_in_place(groups):
    """All of a large buffer is there once, as argument and result."""
    spec = spec_of(slots=400, groups=groups)
    memory = compiled(spec, MeshSpec(data=2, sp=2)).memory_analysis()
    held = bytes_held(spec, (CHUNK, *SIZE), {"data": 2, "fsdp": 1, "sp": 2})
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 4


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 1, 1), (2, 2, 2)], ids=str)
def test_a_checkpoint_fits_any_mesh(tmp_path, shape):
    spec = spec_of()
    start = make_mesh(MeshSpec(data=2, sp=4), jax.devices())
    _, buffers = rollout(spec, start)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "buffers", buffers)
        saver.wait_until_finished()
        sizes = MeshSpec(*shape)
        mesh = make_mesh(sizes, jax.devices()[: sizes.size])
        like = init_buffers(spec, (CHUNK, *SIZE), mesh)
        restored = saver.restore(
            tmp_path / "buffers", jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        )
    for got, want, held in zip(*map(jax.tree.leaves, (restored, buffers, like)), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.sharding.is_equivalent_to(held.sharding, got.ndim)


def test_groups_outlive_a_larger_mesh():
    """Two groups over four data-parallel ranks lie whole on each, and a save of theirs fits."""
    spec, mesh = spec_of(groups=2), make_mesh(MeshSpec(data=4, sp=2), jax.devices())
    buffers = init_buffers(spec, (CHUNK, *SIZE), mesh)
    assert jax.tree.map(jnp.shape, buffers) == jax.tree.map(
        jnp.shape,
        init_buffers(spec, (CHUNK, *SIZE), make_mesh(MeshSpec(data=2, sp=4), jax.devices())),
    )
    held = buffers.latent.entries
    assert held.sharding.shard_shape(held.shape)[0] == 2
    whole = bytes_held(spec, (CHUNK, *SIZE))
    assert bytes_held(spec, (CHUNK, *SIZE), mesh.shape) == whole // 2  # rows over sp alone


def test_memory_is_what_is_said():
    spec = spec_of(groups=2)
    mesh = make_mesh(MeshSpec(data=2, sp=4), jax.devices())
    buffers = init_buffers(spec, (CHUNK, *SIZE), mesh)
    leaves = jax.tree.leaves((buffers.latent, buffers.noise))
    assert bytes_held(spec, (CHUNK, *SIZE)) == sum(x.nbytes for x in leaves)
    on_one = sum(x.addressable_shards[0].data.nbytes for x in leaves)
    assert bytes_held(spec, (CHUNK, *SIZE), mesh.shape) == on_one
    # what the docstring of BufferSpec says of the 5B model
    videos = RecyclingSpec(BufferSpec(rows=48))
    gib = [bytes_held(videos, (8, 44, 80, 48), m) / 2**30 for m in (None, {"sp": 4})]
    np.testing.assert_allclose(gib, [9.7, 2.4], atol=0.05)
