"""The progress callback of long reads and writes."""

from collections.abc import Callable

__all__ = ["ProgressCallback", "no_progress"]

ProgressCallback = Callable[[str, int, int], None]
"""Called with the name of the current item, the bytes done, and the bytes in total."""


def no_progress(name: str, done: int, total: int) -> None:
    """A progress callback that reports nothing."""
