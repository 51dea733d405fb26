"""Preemption: after SIGTERM or Ctrl-C the current step finishes and is checkpointed."""

import signal
from collections.abc import Callable
from typing import Self

import jax
from jax.experimental import multihost_utils

from longlive_jax.io.signals import Stopped, StopSignals

__all__ = ["StopRequest", "Stopped"]


class StopRequest(StopSignals):
    """A context that records SIGTERM and the first Ctrl-C; a second Ctrl-C interrupts immediately.

    In a multi-process job all processes stop after the same step: JAX's preemption service forwards
    a SIGTERM of any process to all, and Ctrl-C is not caught. Outside the main thread no signal is
    caught.
    """

    def __init__(self, notify: Callable[[str], None]):
        super().__init__()
        self._notify = notify

    def __enter__(self) -> Self:
        return super().__enter__() if jax.process_count() == 1 else self

    def received(self, number: int, *, is_first: bool) -> None:
        """Announces the stop, or interrupts at a second Ctrl-C."""
        if number == signal.SIGINT and not is_first:
            raise KeyboardInterrupt
        self._notify("Stopping after this step is saved; Ctrl-C again stops at once.")

    def after(self, step: int) -> int | None:
        """The signal to stop for after `step`, equal in all processes; None to continue."""
        if jax.process_count() == 1:
            return self.signal
        if multihost_utils.reached_preemption_sync_point(step):
            return signal.SIGTERM
        return None
