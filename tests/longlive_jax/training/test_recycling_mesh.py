"""Error recycling over meshes: equal results, no extra communication or memory, checkpoints."""

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
    buffer_bytes,
    buffer_specs,
    init_buffers,
)
from tests.longlive_jax.training.recycled import (
    CHUNK,
    LOSS,
    SIZE,
    assert_all_close,
    make_inputs,
    one_step,
    rollout,
    sharding_of,
    spec_of,
)

LAYOUTS = {
    "by column": {},
    "own groups": {"groups": 2},
    "by chunk": {"by": "chunk", "rows": 5},
    "dealt": {"rows": 4, "buckets": 6, "dealt": True, "replace": "oldest"},
    "one row": {"rows": 1, "replace": "nearest"},
}


@functools.cache
def single_device(name):
    """The `rollout` of a layout on one device."""
    return rollout(spec_of(**LAYOUTS[name]))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("by column", (2, 1, 4)),
        ("by column", (1, 4, 2)),
        ("own groups", (2, 1, 4)),
        ("by chunk", (2, 1, 2)),
        ("dealt", (2, 1, 4)),
        ("one row", (2, 2, 1)),
    ],
    ids=str,
)
def test_results_do_not_depend_on_the_mesh(name, shape):
    spec, sizes = spec_of(**LAYOUTS[name]), MeshSpec(*shape)
    mesh = make_mesh(sizes, jax.devices()[: sizes.size])
    used, buffers = rollout(spec, mesh)
    assert_all_close((used, buffers), single_device(name))
    want = NamedSharding(mesh, buffer_specs(spec).latent.entries)
    for leaf in jax.tree.leaves((buffers.latent, buffers.noise)):
        assert leaf.sharding.is_equivalent_to(want, leaf.ndim)


def compiled_step(spec, sizes: MeshSpec):
    """The compiled program of a step."""
    mesh = make_mesh(sizes, jax.devices()[: sizes.size])
    buffer_shardings = shardings(mesh, buffer_specs(spec))

    def shape(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    buffers = jax.eval_shape(lambda: init_buffers(spec, (CHUNK, *SIZE)))
    inputs = jax.tree.map(lambda x: shape(x, sharding_of(mesh, x)), make_inputs(0))
    run = jax.jit(
        functools.partial(one_step, spec, LOSS),
        donate_argnums=0,
        out_shardings=(None, buffer_shardings),
    )
    return run.lower(jax.tree.map(shape, buffers, buffer_shardings), *inputs).compile()


def test_rows_by_column_need_no_communication_over_sp():
    program = compiled_step(spec_of(), MeshSpec(sp=4)).as_text()
    collectives = re.findall(
        r"(\S+) = \S+ (all-gather|all-reduce|all-to-all|collective-permute)\(", program
    )
    assert not collectives


@pytest.mark.parametrize("groups", [1, 2])
def test_buffers_are_updated_in_place(groups):
    """The buffers, here large, are donated, and the step makes no copy of them."""
    spec = spec_of(slots=400, groups=groups)
    memory = compiled_step(spec, MeshSpec(data=2, sp=2)).memory_analysis()
    size = buffer_bytes(spec, (CHUNK, *SIZE), {"data": 2, "fsdp": 1, "sp": 2})
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 4


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 1, 1), (2, 2, 2)], ids=str)
def test_a_checkpoint_restores_on_any_mesh(tmp_path, shape):
    spec = spec_of()
    start = make_mesh(MeshSpec(data=2, sp=4), jax.devices())
    _, buffers = rollout(spec, start)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "buffers", buffers)
        saver.wait_until_finished()
        sizes = MeshSpec(*shape)
        mesh = make_mesh(sizes, jax.devices()[: sizes.size])
        target = init_buffers(spec, (CHUNK, *SIZE), mesh)
        restored = saver.restore(
            tmp_path / "buffers", jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        )
    for got, want, new in zip(*map(jax.tree.leaves, (restored, buffers, target)), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.sharding.is_equivalent_to(new.sharding, got.ndim)


def test_groups_that_do_not_divide_are_replicated():
    """Two groups over four data-parallel ranks; their shapes are those of any other mesh."""
    spec, mesh = spec_of(groups=2), make_mesh(MeshSpec(data=4, sp=2), jax.devices())
    buffers = init_buffers(spec, (CHUNK, *SIZE), mesh)
    assert jax.tree.map(jnp.shape, buffers) == jax.tree.map(
        jnp.shape,
        init_buffers(spec, (CHUNK, *SIZE), make_mesh(MeshSpec(data=2, sp=4), jax.devices())),
    )
    entries = buffers.latent.entries
    assert entries.sharding.shard_shape(entries.shape)[0] == 2
    total = buffer_bytes(spec, (CHUNK, *SIZE))
    assert buffer_bytes(spec, (CHUNK, *SIZE), mesh.shape) == total // 2  # only rows, over sp


def test_buffer_bytes_equal_the_allocated_size():
    spec = spec_of(groups=2)
    mesh = make_mesh(MeshSpec(data=2, sp=4), jax.devices())
    buffers = init_buffers(spec, (CHUNK, *SIZE), mesh)
    leaves = jax.tree.leaves((buffers.latent, buffers.noise))
    assert buffer_bytes(spec, (CHUNK, *SIZE)) == sum(x.nbytes for x in leaves)
    per_device = sum(x.addressable_shards[0].data.nbytes for x in leaves)
    assert buffer_bytes(spec, (CHUNK, *SIZE), mesh.shape) == per_device
    # The numbers for the 5B model in the docstring of BufferSpec.
    videos = RecyclingSpec(BufferSpec(rows=48))
    gib = [buffer_bytes(videos, (8, 44, 80, 48), m) / 2**30 for m in (None, {"sp": 4})]
    np.testing.assert_allclose(gib, [9.7, 2.4], atol=0.05)
