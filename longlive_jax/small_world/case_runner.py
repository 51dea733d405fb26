"""Measures the cases of an evaluation, with weights and compiled functions that they share."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from longlive_jax.adapters import Adapter, load_adapter, parse_strength
from longlive_jax.io.checkpoint import weights_fingerprint
from longlive_jax.io.models import load_model
from longlive_jax.quant.packed import resident_bytes
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.settings import LOADED_WITH, SampleSpec, spec_for
from longlive_jax.small_world.evaluator import (
    EvaluationSet,
    Example,
    SampledVideos,
    VAEReconstruction,
    VideoProgress,
    ground_truth,
    measure,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the report.

    Attributes:
      part: part of the evaluation, one of PARTS.
      name: unique name.
      videos: evaluation set.
      changes: fields of `SampleSpec` that differ from the run's; None if nothing is sampled.
      checkpoint: checkpoint with other weights; None for the run's checkpoint.
      adapter: adapter to plug in, `PATH` or `PATH:SCALE`, or None.
      log: work directory of the training run, for the table's costs, or None.
    """

    part: str
    name: str
    videos: EvaluationSet
    changes: Mapping[str, Any] | None = None
    checkpoint: Path | None = None
    adapter: str | None = None
    log: Path | None = None


class CaseRunner:
    """Measures cases; they share weights and, where possible, compiled functions.

    Args:
      checkpoint: checkpoint of the run.
      sample: fields of `SampleSpec` that override the checkpoint's.
    """

    def __init__(self, checkpoint: Path, sample: Mapping[str, Any]):
        self.checkpoint = checkpoint
        self.weights = weights_fingerprint(checkpoint)
        self._sample = dict(sample)
        self._loaded: tuple[str, Pipeline] | None = None
        self._adapters: dict[str, tuple[Adapter, float]] = {}

    def settings(self, case: Case) -> SampleSpec | None:
        """Complete sampler settings of a case; None if nothing is sampled.

        The noise levels of an adapter are left out: whether it uses them depends on the others.
        """
        if case.changes is None:
            return None
        folder, own = case.checkpoint or self.checkpoint, {}
        if case.adapter is not None:
            settings = self._adapter(case.adapter)[0].settings
            own = {k: v for k, v in settings.items() if k != "levels"}
        return spec_for(folder, {**own, **self._sample, **case.changes})

    def dependencies(self, case: Case, batch: int) -> dict[str, Any]:
        """Everything that a case's result depends on, ready for JSON."""
        settings = self.settings(case)
        sample = None if settings is None else dataclasses.asdict(settings)
        videos = dataclasses.asdict(case.videos)
        weights = self.weights if case.checkpoint is None else weights_fingerprint(case.checkpoint)
        asked = {"sample": sample, "footage": videos, "batch": batch, "weights": weights}
        if case.adapter is None:
            return asked
        adapter, strength = self._adapter(case.adapter)
        plugged = {"fingerprint": adapter.fingerprint, "strength": strength}
        return asked | {"adapter": plugged | {"settings": dict(adapter.settings)}}

    def measure(self, case: Case, batch: int, on_progress: VideoProgress) -> tuple[dict, Example]:
        """The result of one case, and an example video."""
        if case.name == "truth":
            return measure(ground_truth, case.videos, batch=batch, on_progress=on_progress)
        if case.name == "vae":
            source = VAEReconstruction(load_model(self.checkpoint, "vae"))
            result, example = measure(source, case.videos, batch=batch, on_progress=on_progress)
            return {**result, **source.fidelity()}, example
        pipe = self._pipe(case)
        sampled = SampledVideos(pipe)
        result, example = measure(sampled, case.videos, batch=batch, on_progress=on_progress)
        return {**result, "bytes": _resident(pipe)}, example

    def _pipe(self, case: Case) -> Pipeline:
        """A pipeline with the case's settings; the last one is cached for reuse."""
        folder, changes = case.checkpoint or self.checkpoint, dict(case.changes or {})
        loading = {key: changes.pop(key) for key in LOADED_WITH if key in changes}
        key = json.dumps([str(folder), loading], sort_keys=True)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # one set of weights in memory at a time
            self._loaded = key, Pipeline.from_checkpoint(folder, **self._sample | loading)
        pipe = self._loaded[1].with_settings(**changes)
        return pipe if case.adapter is None else pipe.with_adapter(*self._adapter(case.adapter))

    def _adapter(self, text: str) -> tuple[Adapter, float]:
        """The adapter of `PATH` or `PATH:SCALE` and its strength; UserError if there is none."""
        if text not in self._adapters:
            path, strength = parse_strength(text)
            self._adapters[text] = load_adapter(path), strength
        return self._adapters[text]


def _resident(pipe: Pipeline) -> dict[str, int]:
    """Bytes of the DiT, and of one video's KV cache (both halves with guidance)."""
    cache = jax.eval_shape(lambda: pipe.engine.cache(1, pipe.spec.size))
    return {"dit": sum(resident_bytes(pipe.engine.params).values()), "cache": cache.nbytes}
