"""Adapters plugged into an engine, and the sampling settings that come with them."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

from longlive_jax.adapters.adapter import Adapter
from longlive_jax.adapters.branches import Plugged, branch_rank, fuse, kernel_shapes, plug
from longlive_jax.adapters.files import load_adapter
from longlive_jax.sampling.engine import Engine
from longlive_jax.sampling.settings import LOADED_WITH
from longlive_jax.spec import UserError
from longlive_jax.typing import Params

__all__ = ["AdapterSource", "Adapters", "as_adapters"]

type AdapterSource = Adapter | str | os.PathLike
"""An adapter, or the path of one."""


@dataclasses.dataclass
class _Room:
    """The rank of the branches, which all engines of one model share and which only grows."""

    rank: int = 0

    def take(self, rank: int) -> int:
        """Room for adapters of a rank; the rank of the branches."""
        self.rank = max(self.rank, rank)
        return self.rank


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters that are plugged into a model.

    Attributes:
      plain: the engine without them, with its own settings.
      plugged: adapters and their strengths.
      fused: whether they are merged into the kernels.
      chosen: settings that the caller has chosen; adapters do not change them.
      room: the rank of the branches.
    """

    plain: Engine
    plugged: Plugged = ()
    fused: bool = False
    chosen: frozenset[str] = frozenset()
    room: _Room = dataclasses.field(default_factory=_Room)

    def added(self, more: Plugged, rank: int | None) -> "Adapters":
        """With more adapters; UserError for those that do not fit the model.

        `rank` reserves room for adapters of this total rank.
        """
        shapes = kernel_shapes(self.plain.params)
        for adapter, _ in more:
            adapter.check_fits(shapes)
            adapter.check_finite()
        if rank is not None:
            self.room.take(_reserved(rank))
        return dataclasses.replace(self, plugged=(*self.plugged, *more))

    def params(self) -> Params:
        """The parameters of the model with them."""
        if self.fused:
            return fuse(self.plain.params, self.plugged)
        if not self.plugged:
            return self.plain.params
        rank = self.room.take(branch_rank(self.plugged))
        return plug(self.plain.params, self.plugged, rank)

    def engine(self, params: Params, like: Engine | None = None) -> Engine:
        """The engine with these parameters and the adapters' settings.

        `like` is an engine whose cached prompts are used if it has the same parameters.
        """
        if not self.plugged:
            return self.plain
        engine = (
            self.plain.with_params(params) if like is None or like.params is not params else like
        )
        own = {k: v for k, v in vars(self.plain.spec).items() if k not in LOADED_WITH}
        return self._with_adapter_settings(engine.with_settings(**own))

    def _with_adapter_settings(self, engine: Engine) -> Engine:
        """The engine with the adapters' settings, the last one's first, except chosen ones."""
        # 1. Settings of all adapters.
        settings: dict[str, Any] = {}
        for adapter, _ in self.plugged:
            replaces = {"steps", "shift"} & set(adapter.settings)
            settings |= ({"levels": None} if replaces else {}) | dict(adapter.settings)
        # 2. Without those that are chosen, or that others which are chosen say.
        chosen = self.chosen | ({"steps", "shift"} if "levels" in self.chosen else set())
        settings = {k: v for k, v in settings.items() if k not in chosen}
        levels, steps = settings.get("levels"), settings.get("steps", engine.spec.steps)
        if levels is not None and ("shift" in chosen or len(levels) != steps):
            del settings["levels"]
        return engine.with_settings(**settings) if settings else engine

    def remarks(self, steps: int) -> tuple[str, ...]:
        """A remark for each adapter that was made for another number of steps."""
        own = [(x.name, x.settings.get("steps", steps)) for x, _ in self.plugged]
        return tuple(
            f"{name} was made for {count} steps and is sampled with {steps}"
            for name, count in own
            if count != steps
        )


def _reserved(rank: int) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be a whole number, got {rank!r}")
    if not 1 <= rank <= 4096:
        raise UserError(f"rank must be in [1, 4096], got {rank}")
    return rank


def as_adapters(
    source: AdapterSource | Sequence[AdapterSource], scale: float | Sequence[float]
) -> Plugged:
    """One adapter or several as pairs of adapter and strength; paths are read.

    Raises TypeError or UserError for anything else.
    """
    sources: Any = [source] if isinstance(source, Adapter | str | os.PathLike) else source
    if not isinstance(sources, Sequence):
        raise TypeError(f"an adapter is a path or an Adapter, got {type(source).__name__}")
    scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(sources)
    if len(scales) != len(sources):
        raise UserError(f"{len(sources)} adapters need as many scales, got {len(scales)}")
    for value in scales:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"scale must be a number, got {value!r:.40}")
        if not math.isfinite(value):
            raise UserError(f"scale must be a finite number, got {value}")
    adapters = [x if isinstance(x, Adapter) else load_adapter(x) for x in sources]
    return tuple(zip(adapters, map(float, scales), strict=True))
