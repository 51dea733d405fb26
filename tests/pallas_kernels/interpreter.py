"""Kernels in JAX's Mosaic GPU interpreter, and what its race detector found in all of them.

The interpreter makes a new detector for every kernel and remembers the last one only, while one
call may run several: attention with its gradient runs three.
"""

import contextlib
from collections.abc import Iterator

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

SIMULATED = plgpu.InterpretGPUParams(detect_races=True)


@contextlib.contextmanager
def no_races(kernels: int) -> Iterator[None]:
    """Asserts that its body interprets so many kernels, and that none of them races.

    They must be called with `interpret=SIMULATED`.
    """
    make, detectors = gpu_callbacks.GPURaceDetectionState, []

    def remembered(**options):
        detectors.append(make(**options))
        return detectors[-1]

    gpu_callbacks.GPURaceDetectionState = remembered
    try:
        yield
        jax.effects_barrier()
    finally:
        gpu_callbacks.GPURaceDetectionState = make
    found = [detector.races_found for detector in detectors]
    assert len(found) == kernels, f"{len(found)} kernels were interpreted, not {kernels}"
    assert not any(found), f"kernels with races, in order: {found}"
