"""Reports which samples of a dataset can be used, and why the others cannot."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from longlive_jax.data.clips.clip_plan import FPS, JoinSpec, count_chunks, plan_clip
from longlive_jax.data.clips.dataset import Unusable, VideoSample
from longlive_jax.data.clips.decoding import check_first_frame, probe, verify
from longlive_jax.data.clips.source import shot_lengths

__all__ = ["SampleReport", "check_samples"]


@dataclasses.dataclass(frozen=True)
class SampleReport:
    """The result of checking one sample; numbers are 0 if a file could not be read.

    Attributes:
      name: the sample's name.
      shots: number of shots.
      seconds: total duration of its shots.
      sizes: distinct frame sizes of its files, as "HEIGHTxWIDTH" in pixels.
      rates: distinct frame rates of its files, in frames per second.
      chunks: chunks that its shots fill from the beginning.
      reason: why it cannot be used; empty if it can.
      remarks: shots that were left out.
    """

    name: str
    shots: int
    seconds: float = 0.0
    sizes: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    chunks: int = 0
    reason: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether clips can be made from it."""
        return not self.reason

    def values(self) -> dict[str, Any]:
        """The fields by name, and `usable`."""
        return dataclasses.asdict(self) | {"usable": self.usable}


def check_samples(
    samples: Sequence[VideoSample],
    join: JoinSpec,
    *,
    size: tuple[int, int] | None = None,
    decode: bool = False,
    threads: int = 4,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[SampleReport]:
    """Reads every file and returns one report per sample, in order.

    Args:
      samples: the samples of a dataset.
      join: joining rules that a sample must satisfy.
      size: (height, width) in pixels; shots whose aspect ratio is too far from it are unusable.
      decode: decode every frame as well.
      threads: samples checked at once.
      progress: callback that takes the number of samples checked, and of all samples.
    """
    reports = []
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for report in pool.map(lambda sample: _check(sample, join, size, decode), samples):
            reports.append(report)
            progress(len(reports), len(samples))
    return reports


def _check(
    sample: VideoSample, join: JoinSpec, size: tuple[int, int] | None, decode: bool
) -> SampleReport:
    report = SampleReport(sample.name, len(sample.shots), remarks=sample.remarks)
    try:
        lengths = shot_lengths(sample)
        infos = [probe(shot.file) for shot in sample.shots]
        report = dataclasses.replace(
            report,
            seconds=round(sum(lengths) / FPS, 3),
            sizes=tuple(sorted({f"{info.height}x{info.width}" for info in infos})),
            rates=tuple(sorted({round(float(info.rate), 3) for info in infos})),
        )
        for file in {shot.file: None for shot in sample.shots}:
            verify(file, decode=decode)
        report = dataclasses.replace(report, chunks=count_chunks(lengths, join))
        plan_clip(lengths, join)
        if size is not None:
            for shot in sample.shots:
                check_first_frame(shot, size)
    except Unusable as reason:
        return dataclasses.replace(report, reason=str(reason))
    return report
