"""Block-scaled products in JAX's Mosaic GPU interpreter, which has none of its own.

`with nvfp4_interpreter(): ...` around the call of a kernel with `interpret=InterpretGPUParams()`
makes the interpreter simulate `async_copy_scales_to_tmem` and `tcgen05_mma` with scales, race
detection included: a copy of scales is ordered before the products that the same thread issues
later, but not after those it issued earlier, as PTX has it. Only for tests; it replaces private
parts of the pinned JAX version.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as callbacks

Fixes = dict[Any, Callable[[np.ndarray], np.ndarray]]  # by the key of a buffer


class _Seen:
    """The simulated memory, with some buffers read otherwise than they are."""

    def __init__(self, memory: Any, fixes: Fixes):
        self._memory, self._fixes = memory, fixes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def get_buffer_content(self, key: Any, *rest: Any, **options: Any) -> Any:
        content, *others = self._memory.get_buffer_content(key, *rest, **options)
        if content is not None and key in self._fixes:
            content = self._fixes[key](content)
        return content, *others


@contextlib.contextmanager
def nvfp4_interpreter() -> Iterator[None]:
    """Simulates block-scaled products within its body."""
    memory = callbacks._get_shared_memory
    here = threading.local()  # every simulated thread is one of the host

    def with_fixes(fixes: Fixes, run: Callable, *arguments: Any) -> Any:
        here.view = _Seen(memory(), fixes)
        try:
            return run(*arguments)
        finally:
            here.view = None

    copy, mma = callbacks.TcGen05Copy.__call__, callbacks.TcGen05Mma.__call__

    def copy_scales(task: Any, clock: Any, number: int) -> Any:
        return with_fixes({task.smem_key: _by_rows}, copy, task, clock, number)

    def scaled_mma(task: Any, clock: Any, number: int) -> Any:
        if task.a_scale_key is None:
            return mma(task, clock, number)
        a_scale, b_scale = _scales(memory(), task, clock, number)
        fixes: Fixes = {
            task.a_key: lambda a: _scaled(a, a_scale),
            task.b_key: lambda b: _scaled(b.T, b_scale[: b.shape[1]]).T,
        }
        bare = dataclasses.replace(task, a_scale_key=None, b_scale_key=None)
        return with_fixes(fixes, mma, bare, clock, number)

    replaced = [
        (callbacks, "_get_shared_memory", lambda: getattr(here, "view", None) or memory()),
        (callbacks.TcGen05Copy, "__call__", copy_scales),
        (callbacks.TcGen05Mma, "__call__", scaled_mma),
        # The interpreter finds what to do by this name.
        (primitives, "async_copy_smem_to_tmem_p", primitives.async_copy_scales_to_tmem_p),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, new in replaced:
            setattr(owner, name, new)
        yield
    finally:
        for owner, name, old in kept:
            setattr(owner, name, old)


def _by_rows(tiles: np.ndarray) -> np.ndarray:
    """Tiles [rows / 128, k / 64, 32, 16] of swizzled scales as [rows, k / 16]."""
    down, right, *_ = tiles.shape
    parts = tiles.reshape(down, right, 32, 4, 4)  # row % 32, row // 32, column
    return parts.transpose(0, 3, 2, 1, 4).reshape(down * 128, right * 4)


def _scaled(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes [rows, k] times their scales [rows, k / 16]."""
    rows, k = codes.shape
    if scales.shape != (rows, k // 16):
        raise ValueError(f"scales {scales.shape} do not fit codes {codes.shape}")
    return codes.astype(np.float32) * np.repeat(scales.astype(np.float32), 16, axis=1)


def _scales(memory: Any, task: Any, pipeline_clock: Any, number: int) -> list[np.ndarray]:
    """The scales of both operands, read from tensor memory under the eye of race detection."""
    found = []
    for key, transforms in (
        (task.a_scale_key, task.a_scale_transforms),
        (task.b_scale_key, task.b_scale_transforms),
    ):
        access = memory.access(key, transforms or ())
        found.append(memory.get_buffer_content(key, access, None)[0])
        if memory.detect_races:
            clock = memory.get_clock(task.thread)
            if pipeline_clock is not None:
                clock.update(pipeline_clock)
            clock.inc(number)
            callbacks.get_races().check_read(
                task.thread, clock.generic_clock, key, access, source_info=task.source_info
            )
    return found
