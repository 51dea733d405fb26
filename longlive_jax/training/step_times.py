"""Seconds of each kind of step, measured without waiting for the device in the training loop."""

import contextlib
import queue
import threading
import time
from collections import defaultdict
from typing import Any

import jax

__all__ = ["StepTimes"]


class StepTimes:
    """Times steps by when their results are ready; a thread waits for them.

    A step lasts from when the one before it was ready, or from when it was enqueued if that was
    later. The first of each kind is left out, because it compiles. Use it as a context manager:
    leaving it ends the thread.
    """

    def __init__(self) -> None:
        self._steps: queue.Queue[tuple[str, float, Any] | None] = queue.Queue()
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "StepTimes":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._steps.put(None)
        self._thread.join()

    def add(self, kind: str, enqueued: float, results: Any) -> None:
        """A step of this kind computes the arrays `results`.

        It was enqueued when `time.perf_counter()` was `enqueued`.
        """
        self._steps.put((kind, enqueued, results))

    def means(self) -> dict[str, float]:
        """Mean seconds of each kind of the steps since the last call, after waiting for them."""
        self._steps.join()
        seconds, self._seconds = self._seconds, defaultdict(list)
        return {kind: sum(values) / len(values) for kind, values in seconds.items()}

    def _watch(self) -> None:
        ready, kinds = 0.0, set()
        while (step := self._steps.get()) is not None:
            kind, enqueued, results = step
            with contextlib.suppress(Exception):  # the loop meets the same error and reports it
                jax.block_until_ready(results)
            began, ready = max(ready, enqueued), time.perf_counter()
            if kind in kinds:
                self._seconds[kind].append(ready - began)
            kinds.add(kind)
            self._steps.task_done()
