"""Progress bars on standard error: for the chunks of a video, and for any other task."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Bars:
    """A context manager of rich progress bars that leaves standard output alone."""

    def __init__(self, *columns: str):
        texts = (TextColumn(text) for text in columns)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *texts,
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True),
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()


class ChunkBar(Bars):
    """A bar with the chunks done, seconds of video, and frames per second after the first chunk.

    Args:
      chunks: number of chunks; None if it is not known in advance.
      fps: frame rate of the video.
      text: label of the bar.
    """

    def __init__(self, chunks: int | None, *, fps: float, text: str = "sampling"):
        super().__init__("chunk {task.fields[at]}", "{task.fields[video]}", "{task.fields[speed]}")
        self._total, self._fps = chunks, fps
        self._frames = 0
        self._first: tuple[float, int] | None = None
        self._task: TaskID = self._bars.add_task(text, total=chunks, at="–", video="", speed="")

    def advance(self, frames: int, videos: int = 1) -> None:
        """Counts one more chunk of `frames` frames, in `videos` videos of one batch."""
        now = time.perf_counter()
        self._frames += frames
        self._first = self._first or (now, self._frames)
        seconds, timed_frames = now - self._first[0], self._frames - self._first[1]
        rate = videos * timed_frames / seconds if timed_frames and seconds > 0 else None
        done = int(self._bars.tasks[self._task].completed) + 1
        self._bars.update(
            self._task,
            advance=1,
            at=str(done) if self._total is None else f"{done}/{self._total}",
            video=f"{self._frames / self._fps:.1f} s",
            speed="" if rate is None else f"{rate:.0f} frames/s",
        )


class ProgressBars(Bars):
    """A sequence of bars, each of which shows a percentage."""

    def __init__(self) -> None:
        super().__init__("{task.percentage:>3.0f} %")

    def begin(self, text: str) -> Callable[[float, int], None]:
        """Adds a bar with the label `text`, and returns the function that updates it.

        The function takes the amount done and the total.
        """
        task = self._bars.add_task(text, total=None)

        def tick(done: float, total: int) -> None:
            self._bars.update(task, completed=done, total=total)

        return tick
