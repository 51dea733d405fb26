"""Ending a run from outside: SIGTERM and Ctrl-C let the update finish and save it."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from longlive_jax.spec import Failure


class Stopped(Failure):
    """A run that was told to stop and saved; `code` is 128 + the signal, as shells count."""

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.code = code


class StopRequest:
    """While entered, remembers a SIGTERM or the first Ctrl-C; a second Ctrl-C stops at once.

    With more processes than one all of them stop after the same step: JAX's preemption service
    passes a SIGTERM to any of them on to all, and Ctrl-C is not caught. Nor is anything elsewhere
    than on the main thread.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            caught = (signal.SIGINT, signal.SIGTERM)
            self._before = {number: signal.signal(number, self._remember) for number in caught}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        self._say("Stopping: the update is finished and saved; Ctrl-C again stops at once.")

    def after(self, step: int) -> int | None:
        """The signal to stop for after this step, the same in every process; None: go on."""
        if jax.process_count() == 1:
            return self._signal
        if multihost_utils.reached_preemption_sync_point(step):
            return signal.SIGTERM
        return None
