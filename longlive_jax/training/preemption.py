"""Preemption: after SIGTERM or Ctrl-C the current step finishes and is checkpointed."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from longlive_jax.spec import Failure


class Stopped(Failure):
    """A run that stopped on a signal after saving a checkpoint.

    `code` is the exit code, 128 + the signal number by shell convention.
    """

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.code = code


class StopRequest:
    """A context that records SIGTERM and the first Ctrl-C; a second Ctrl-C interrupts immediately.

    In a multi-process job all processes stop after the same step: JAX's preemption service forwards
    a SIGTERM of any process to all, and Ctrl-C is not caught. Outside the main thread no signal is
    caught.
    """

    def __init__(self, notify: Callable[[str], None]):
        self._notify = notify
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            caught = (signal.SIGINT, signal.SIGTERM)
            self._previous = {number: signal.signal(number, self._record) for number in caught}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        self._notify("Stopping after this step is saved; Ctrl-C again stops at once.")

    def after(self, step: int) -> int | None:
        """The signal to stop for after `step`, equal in all processes; None to continue."""
        if jax.process_count() == 1:
            return self._signal
        if multihost_utils.reached_preemption_sync_point(step):
            return signal.SIGTERM
        return None
