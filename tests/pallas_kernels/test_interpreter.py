"""The race detector of the tests, on a kernel with a race, and its version guard."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.pallas_kernels.interpreter import SIMULATED, no_races, private_modules


def copied(x, *, by_both: bool):
    """Copies `x` through shared memory, which one warpgroup fills, or both at once."""

    def kernel(source, out, buffer):
        warpgroup = jax.lax.axis_index("warpgroup")

        @pl.when((warpgroup == 0) | by_both)
        def _():
            buffer[...] = source[...]

        plgpu.commit_smem()

        @pl.when(warpgroup == 0)
        def _():
            plgpu.copy_smem_to_gmem(buffer, out)
            plgpu.wait_smem_to_gmem(0)

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM(x.shape, x.dtype)],
        interpret=SIMULATED,
    )
    return call(x)


@pytest.mark.parametrize("jitted", [False, True], ids=["call by call", "jit"])
@pytest.mark.parametrize("last", [False, True], ids=["the first races", "the last races"])
def test_a_race_of_any_kernel_is_found(last, jitted):
    def both(x):
        return copied(copied(x, by_both=not last), by_both=last)

    run = jax.jit(both) if jitted else both
    message = f"with races, in order: .{not last}, {last}."
    with pytest.raises(AssertionError, match=message), no_races(kernels=2):
        run(jnp.ones(64))


def test_clean_kernels_pass_and_are_counted():
    x = jnp.arange(64.0)
    with no_races(kernels=2):
        y = copied(copied(x, by_both=False), by_both=False)
    np.testing.assert_array_equal(x, y)
    with (
        pytest.raises(AssertionError, match="1 kernels were interpreted, not 2"),
        no_races(kernels=2),
    ):
        copied(x, by_both=False)


def test_other_versions_of_jax_are_skipped(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.13.0")
    with pytest.raises(pytest.skip.Exception, match=r"JAX 0\.11\.x or 0\.12\.x, this is JAX 0\.13"):
        private_modules()
