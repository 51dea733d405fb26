"""What of a dataset can be used, sample by sample, and why the rest cannot."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from longlive_jax.data.clips.clip_plan import FPS, JoinSpec, count, plan
from longlive_jax.data.clips.dataset import Sample, Unusable
from longlive_jax.data.clips.decoding import check_fits, probe, verify
from longlive_jax.data.clips.source import lengths_of

__all__ = ["Finding", "check_samples"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found about a sample; numbers are 0 where a file could not be read.

    Attributes:
      seconds: of all its shots together.
      sizes, rates: distinct ones of its files, as height x width in pixels and in frames a second.
      chunks: that its shots fill from the beginning.
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
        """Whether clips can be made of it."""
        return not self.reason

    def values(self) -> dict[str, Any]:
        """The fields by name, and `usable`."""
        return dataclasses.asdict(self) | {"usable": self.usable}


def check_samples(
    samples: Sequence[Sample],
    join: JoinSpec,
    *,
    size: tuple[int, int] | None = None,
    decode: bool = False,
    threads: int = 4,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Finding]:
    """Opens and reads every file, and decodes it whole if asked to; findings in order.

    Given `size` (height, width), shots whose pictures are too far from its shape are found too.
    """
    found = []
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for finding in pool.map(lambda sample: _check(sample, join, size, decode), samples):
            found.append(finding)
            progress(len(found), len(samples))
    return found


def _check(sample: Sample, join: JoinSpec, size: tuple[int, int] | None, decode: bool) -> Finding:
    finding = Finding(sample.name, len(sample.shots), remarks=sample.remarks)
    try:
        lengths = lengths_of(sample)
        infos = [probe(shot.file) for shot in sample.shots]
        finding = dataclasses.replace(
            finding,
            seconds=round(sum(lengths) / FPS, 3),
            sizes=tuple(sorted({f"{info.height}x{info.width}" for info in infos})),
            rates=tuple(sorted({round(float(info.rate), 3) for info in infos})),
        )
        for file in {shot.file: None for shot in sample.shots}:
            verify(file, decode=decode)
        finding = dataclasses.replace(finding, chunks=count(lengths, join))
        plan(lengths, join)
        if size is not None:
            for shot in sample.shots:
                check_fits(shot, size)
    except Unusable as reason:
        return dataclasses.replace(finding, reason=str(reason))
    return finding
