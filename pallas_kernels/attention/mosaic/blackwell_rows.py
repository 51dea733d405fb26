"""Blackwell's tensor memory with one row per thread, where warps are independent of each other.

`plgpu.wait_load_tmem` and `commit_tmem` also synchronize the warpgroup. That costs time, and stops
the program where warps branch apart. Here every warp reads and writes rows of its own, so it waits
for itself only. JAX's interpreter knows these functions by their names.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

ROW = plgpu.Layout.TCGEN05_TMEM_NATIVE  # one row per thread
_DIALECTS: Any = mgpu.utils


def load_rows(ref):
    """Loads from tensor memory with one row per thread."""
    return plgpu.async_load_tmem(ref, layout=ROW)


def wait_loads():
    """Waits for this warp's loads from tensor memory; it may then overwrite what it read."""

    @plgpu.inline_mgpu()
    def tcgen05_wait_ld(_):
        nvvm = _DIALECTS.nvvm
        nvvm.tcgen05_wait(nvvm.Tcgen05WaitKind.LOAD)

    tcgen05_wait_ld()


def wait_stores():
    """Waits for this warp's stores to tensor memory; an arrival at a barrier may then follow."""

    @plgpu.inline_mgpu()
    def tcgen05_wait_st(_):
        nvvm = _DIALECTS.nvvm
        nvvm.tcgen05_wait(nvvm.Tcgen05WaitKind.STORE)

    tcgen05_wait_st()


def any_row(condition):
    """Whether a condition on rows holds in any row of this warp; each warp has its own answer.

    Warps may branch on it as long as no branch synchronizes them.
    """
    answer = plgpu.ShapeDtypeStruct((), jnp.bool_, plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=(ROW.reduce(1),), return_type=answer)
    def warp_any(_, condition):
        (register,) = condition.registers.flat
        mine = _DIALECTS.vector.extract(register, [], [0])
        every_lane = mgpu.c(0xFFFFFFFF, _DIALECTS.ir.IntegerType.get_signless(32))
        vote = _DIALECTS.nvvm.vote_sync(every_lane, mine, "any")
        return mgpu.FragmentedArray.splat(vote, (), is_signed=False)

    return warp_any(condition)
