"""Progress bars on standard error: a video by its chunks, and anything by its share."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Bars:
    """Context manager of rich bars that keeps standard output clean."""

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
    """Chunks made, seconds of video, and frames per second since the first chunk was there."""

    def __init__(self, chunks: int | None, *, fps: float, text: str = "sampling"):
        super().__init__("chunk {task.fields[at]}", "{task.fields[video]}", "{task.fields[speed]}")
        self._total, self._fps = chunks, fps
        self._frames = 0
        self._first: tuple[float, int] | None = None
        self._task: TaskID = self._bars.add_task(text, total=chunks, at="–", video="", speed="")

    def advance(self, frames: int, videos: int = 1) -> None:
        """One more chunk of so many frames is done, in so many videos at once."""
        now = time.perf_counter()
        self._frames += frames
        self._first = self._first or (now, self._frames)
        since, before = now - self._first[0], self._frames - self._first[1]
        made = int(self._bars.tasks[self._task].completed) + 1
        self._bars.update(
            self._task,
            advance=1,
            at=str(made) if self._total is None else f"{made}/{self._total}",
            video=f"{self._frames / self._fps:.1f} s",
            speed=f"{videos * before / since:.0f} frames/s" if before and since > 0 else "",
        )


class ShareBars(Bars):
    """One bar after the other, each told how much of it is done."""

    def __init__(self) -> None:
        super().__init__("{task.percentage:>3.0f} %")

    def begin(self, text: str):
        """A new bar; call the result with (done, total)."""
        task = self._bars.add_task(text, total=None)

        def tick(done: float, total: int) -> None:
            self._bars.update(task, completed=done, total=total)

        return tick
