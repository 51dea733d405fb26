"""Meshes: device order, and settings that do not fit them."""

import jax
import pytest

from longlive_jax.parallel.mesh import AXES, MeshSpec, check_fits, make_mesh


def test_sp_is_the_innermost_axis():
    mesh = make_mesh(MeshSpec(data=2, fsdp=1, sp=4))
    assert mesh.axis_names == AXES and mesh.devices.shape == (2, 1, 4)
    assert [d.id for d in mesh.devices[0, 0]] == [d.id for d in jax.devices()[:4]]


def test_a_mesh_of_the_wrong_size_raises():
    with pytest.raises(
        ValueError, match=r"data=1 x fsdp=1 x sp=3 needs 3 devices, found 8.*product is 8"
    ):
        make_mesh(MeshSpec(sp=3))
    with pytest.raises(ValueError, match=r"mesh\.data must be >= 1, got 0"):
        MeshSpec(data=0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((6, 8, 2), "6 attention heads do not split over mesh.sp = 4"),
        ((8, 6, 2), "6 chunks of a sequence .* 1, 2, 3, 6"),
        ((8, 8, 3), "3 samples in a batch .* mesh.data \\* mesh.fsdp = 2"),
    ],
)
def test_sizes_that_do_not_divide_are_named(sizes, message):
    heads, chunks, batch = sizes
    with pytest.raises(ValueError, match=message):
        check_fits(MeshSpec(data=1, fsdp=2, sp=4), heads=heads, chunks=chunks, batch=batch)
    check_fits(MeshSpec(data=1, fsdp=2, sp=4), heads=8, chunks=8, batch=4)
