"""Communication volume counted from HLO text, written by hand and compiled."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from longlive_jax.planning.collectives import KINDS, Traffic, traffic

LOOP = """
HloModule example

%body.1 (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %start = ((bf16[8,4]{1,0}), bf16[32,4]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %done = bf16[32,4]{1,0} all-gather-done(%start)
  %two = ((f32[8]{0}, f32[4]{0}), (f32[2]{0}, f32[1]{0})) reduce-scatter-start(%a, %b), replica_groups=mesh['data'=2,'sp'=4] {'sp'}, to_apply=%add
  ROOT %t = (s32[], bf16[8,4]) tuple(%i, %x)
}

%condition.1 (p: (s32[], bf16[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %loop = (s32[], bf16[8,4]) while(%init), condition=%condition.1, body=%body.1TRIPS
  %sum = f32[16]{0} all-reduce(%y), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %sent = f8e4m3fn[3,5]{1,0} collective-permute(%z), source_target_pairs={{0,1}}
  ROOT %out = bf16[8,4] get-tuple-element(%loop), index=1
}
"""  # noqa: E501
TRIPS = ', backend_config={"known_trip_count":{"n":"30"},"known_init_step":{}}'


def test_an_operation_in_a_loop_counts_once_per_iteration():
    assert traffic(LOOP.replace("TRIPS", TRIPS), 8) == {
        "all-gather": Traffic(30, 30 * 32 * 4 * 2 * 3 / 4),
        "reduce-scatter": Traffic(30, 30 * (8 + 4) * 4 * 3 / 4),
        "all-to-all": Traffic(),
        "all-reduce": Traffic(1, 2 * 16 * 4 * 7 / 8),
        "collective-permute": Traffic(1, 15),
    }


def test_a_loop_of_unknown_length_is_rejected():
    with pytest.raises(ValueError, match="unknown length"):
        traffic(LOOP.replace("TRIPS", ""), 8)


@pytest.mark.parametrize("shape", [(8,), (2, 4)])
def test_traffic_of_a_compiled_program(shape):
    """A loop of three iterations exchanges 8 x 16 floats per device along the last mesh axis."""
    names = ("data", "sp")[-len(shape) :]
    mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
    n = shape[-1]

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=P("sp"), out_specs=P("sp"), check_vma=False)
    def program(x):
        def step(x, _):
            gathered = lax.all_gather(x, "sp", axis=0, tiled=True)
            swapped = lax.all_to_all(jnp.sin(x), "sp", split_axis=1, concat_axis=0, tiled=True)
            return x + gathered[: len(x)] * lax.psum(swapped.sum(), "sp"), None

        return lax.scan(step, x, length=3)[0]

    x = jax.ShapeDtypeStruct((8 * n, 16), jnp.float32)
    volumes = traffic(program.lower(x).compile().as_text(), mesh.size)
    size = 8 * 16 * 4
    assert volumes["all-gather"] == Traffic(3, 3 * size * (n - 1))
    assert volumes["all-to-all"] == Traffic(3, 3 * size * (n - 1) / n)
    assert volumes["all-reduce"] == Traffic(3, 3 * 2 * 4 * (n - 1) / n)
    assert {k for k, x in volumes.items() if x.count} == set(KINDS[:1] + KINDS[2:4])
