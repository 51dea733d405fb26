"""Pallas kernels in JAX's Mosaic GPU interpreter, with race detection and block-scaled products.

All uses of private JAX modules by the kernels' tests are in this module. Tests skip if JAX has
another version than the one that this module was written for.

`no_races` collects the race detectors of all kernels in its body: the interpreter creates one for
every kernel and keeps only the last, while attention with its gradient runs three kernels.

`block_scaled_products` simulates `async_copy_scales_to_tmem` and `tcgen05_mma` with scales, which
the interpreter lacks, with race detection: a copy of scales is ordered before the products that the
same thread issues later, but not after those it issued earlier, as PTX specifies.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

# JAX 0.12 raises at the first race unless told to go on; JAX 0.11 always goes on.
_FIELDS = {field.name for field in dataclasses.fields(plgpu.InterpretGPUParams)}
SIMULATED = plgpu.InterpretGPUParams(
    detect_races=True,
    # A vote of a warp (`warp_any`) is simulated as a vote of the warpgroup.
    inline_mgpu="_hack_model_inline_mgpu_tokamax",
    **({"on_race": "warn"} if "on_race" in _FIELDS else {}),
)
"""The `interpret` argument of a kernel."""
SUPPORTED = ("0.11.", "0.12.")
"""Prefixes of the JAX versions whose private modules this module uses."""

Overrides = dict[Any, Callable[[np.ndarray], np.ndarray]]
"""Key of a simulated buffer -> function of its content."""


def private_modules() -> tuple[Any, Any]:
    """JAX's private `primitives` and `gpu_callbacks`; skips the test for other versions of JAX."""
    if not jax.__version__.startswith(SUPPORTED):
        pytest.skip(
            "the kernels' interpreter needs private parts of JAX "
            f"{' or '.join(f'{prefix}x' for prefix in SUPPORTED)}, this is JAX {jax.__version__}"
        )
    from jax._src.pallas.mosaic_gpu import primitives
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return primitives, gpu_callbacks


@contextlib.contextmanager
def no_races(kernels: int) -> Iterator[None]:
    """Asserts that its body interprets this number of kernels and that none of them has a race.

    The kernels must be called with `interpret=SIMULATED`.
    """
    _, callbacks = private_modules()
    make, detectors = callbacks.GPURaceDetectionState, []

    def recorded(**options):
        detectors.append(make(**options))
        return detectors[-1]

    callbacks.GPURaceDetectionState = recorded
    try:
        yield
        jax.effects_barrier()
    finally:
        callbacks.GPURaceDetectionState = make
    races = [detector.races_found for detector in detectors]
    assert len(races) == kernels, f"{len(races)} kernels were interpreted, not {kernels}"
    assert not any(races), f"kernels with races, in order: {races}"


class _OverriddenMemory:
    """The simulated memory, with the content of some buffers replaced when it is read."""

    def __init__(self, memory: Any, overrides: Overrides):
        self._memory, self._overrides = memory, overrides

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def get_buffer_content(self, key: Any, *rest: Any, **options: Any) -> Any:
        content, *others = self._memory.get_buffer_content(key, *rest, **options)
        if content is not None and key in self._overrides:
            content = self._overrides[key](content)
        return content, *others


@contextlib.contextmanager
def block_scaled_products() -> Iterator[None]:
    """Simulates block-scaled products within its body."""
    primitives, callbacks = private_modules()
    memory = callbacks._get_shared_memory
    local = threading.local()  # each simulated thread is a thread of the host

    # 1. Run a simulated instruction with some buffers overridden.
    def with_overrides(overrides: Overrides, run: Callable, *arguments: Any) -> Any:
        local.view = _OverriddenMemory(memory(), overrides)
        try:
            return run(*arguments)
        finally:
            local.view = None

    copy, mma = callbacks.TcGen05Copy.__call__, callbacks.TcGen05Mma.__call__

    def copy_scales(task: Any, clock: Any, number: int) -> Any:
        return with_overrides({task.smem_key: _unswizzled}, copy, task, clock, number)

    # 2. A product with scales is the product of scaled operands.
    def scaled_mma(task: Any, clock: Any, number: int) -> Any:
        if task.a_scale_key is None:
            return mma(task, clock, number)
        a_scale, b_scale = _read_scales(callbacks, memory(), task, clock, number)
        overrides: Overrides = {
            task.a_key: lambda a: _scaled(a, a_scale),
            task.b_key: lambda b: _scaled(b.T, b_scale[: b.shape[1]]).T,
        }
        bare = dataclasses.replace(task, a_scale_key=None, b_scale_key=None)
        return with_overrides(overrides, mma, bare, clock, number)

    # 3. Install the replacements, and restore the originals at the end.
    replacements = [
        (callbacks, "_get_shared_memory", lambda: getattr(local, "view", None) or memory()),
        (callbacks.TcGen05Copy, "__call__", copy_scales),
        (callbacks.TcGen05Mma, "__call__", scaled_mma),
        # The interpreter looks the operation up under this name.
        (primitives, "async_copy_smem_to_tmem_p", primitives.async_copy_scales_to_tmem_p),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    try:
        for owner, name, new in replacements:
            setattr(owner, name, new)
        yield
    finally:
        for owner, name, old in originals:
            setattr(owner, name, old)


def _unswizzled(tiles: np.ndarray) -> np.ndarray:
    """Tiles [rows / 128, k / 64, 32, 16] of swizzled scales as [rows, k / 16]."""
    down, right, *_ = tiles.shape
    parts = tiles.reshape(down, right, 32, 4, 4)  # row % 32, row // 32, column
    return parts.transpose(0, 3, 2, 1, 4).reshape(down * 128, right * 4)


def _scaled(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes [rows, k] times their scales [rows, k / 16]."""
    rows, k = codes.shape
    if scales.shape != (rows, k // 16):
        raise ValueError(f"scales {scales.shape} do not match codes {codes.shape}")
    return codes.astype(np.float32) * np.repeat(scales.astype(np.float32), 16, axis=1)


def _read_scales(
    callbacks: Any, memory: Any, task: Any, pipeline_clock: Any, number: int
) -> list[np.ndarray]:
    """The scales of both operands, read from tensor memory with race detection."""
    scales = []
    for key, transforms in (
        (task.a_scale_key, task.a_scale_transforms),
        (task.b_scale_key, task.b_scale_transforms),
    ):
        access = memory.access(key, transforms or ())
        scales.append(memory.get_buffer_content(key, access, None)[0])
        if memory.detect_races:
            clock = memory.get_clock(task.thread)
            if pipeline_clock is not None:
                clock.update(pipeline_clock)
            clock.inc(number)
            callbacks.get_races().check_read(
                task.thread, clock.generic_clock, key, access, source_info=task.source_info
            )
    return scales
