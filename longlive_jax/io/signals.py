"""SIGTERM and Ctrl-C, recorded so that a run can finish its files before it stops."""

import signal
import threading
from types import FrameType
from typing import Any, Self

from longlive_jax.spec import Failure

__all__ = ["StopSignals", "Stopped"]


class Stopped(Failure):
    """A run that stopped on a signal after saving its work.

    `code` is the exit code, 128 + the signal number by shell convention.
    """

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.code = code


class StopSignals:
    """A context that records the first SIGTERM or Ctrl-C and passes every one to `received`.

    Outside the main thread, where Python cannot catch signals, it changes nothing.

    Attributes:
      signal: number of the first signal, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT, signal.SIGTERM)
            # Python cannot restore a handler that it has not installed, which is None.
            caught = [number for number in numbers if signal.getsignal(number) is not None]
            self._previous = {number: signal.signal(number, self._record) for number in caught}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _record(self, number: int, _frame: FrameType | None) -> None:
        is_first = self.signal is None
        if is_first:
            self.signal = number
        self.received(number, is_first=is_first)

    def received(self, number: int, *, is_first: bool) -> None:
        """Called in the main thread for every signal; may raise. Does nothing by default."""
