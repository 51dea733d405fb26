"""Interruption of a command that writes videos: SIGTERM and Ctrl-C leave playable files."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from longlive_jax.io.signals import Stopped, StopSignals

__all__ = ["Interruption"]


class Interruption(StopSignals):
    """Turns SIGTERM and Ctrl-C into a KeyboardInterrupt that leaves files finished.

        with Interruption() as interruption:
            load()
            with interruption.deferred():
                for chunk in interruption.waiting(stream):
                    recorder.append(chunk)
                recorder.close()

    The first signal interrupts at once, also while the next chunk is computed. Within `deferred` it
    waits until the files are written; there a second signal interrupts at once. Leaving the context
    after SIGTERM raises `Stopped` with exit code 143; Ctrl-C stays a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_deferring = False

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        super().__exit__(kind, *rest)
        is_interrupt = kind is not None and issubclass(kind, KeyboardInterrupt)
        if is_interrupt and self.signal == signal.SIGTERM:
            raise Stopped("terminated by SIGTERM", 128 + signal.SIGTERM)

    def received(self, number: int, *, is_first: bool) -> None:
        """Raises KeyboardInterrupt, unless it is the first signal and files are being written."""
        if not (is_first and self._is_deferring):
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raises KeyboardInterrupt if there was a signal."""
        if self.signal is not None:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A block that the first signal interrupts only at its end, or in `waiting`."""
        self._is_deferring = True
        try:
            yield
        finally:
            self._is_deferring = False
        self.check()

    def waiting[T](self, items: Iterator[T]) -> Iterator[T]:
        """The items, within `deferred`; signals interrupt waiting for the next one."""
        while True:
            self._is_deferring = False
            try:
                self.check()
                item = next(items)
            except StopIteration:
                return
            finally:
                self._is_deferring = True
            yield item
