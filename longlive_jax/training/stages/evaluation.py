"""What a stage does at every evaluation: samples a preview and measures the held-out loss."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from longlive_jax.parallel.hosts import gather_to_hosts
from longlive_jax.training.metrics import mean_metrics
from longlive_jax.training.objectives.teacher_forcing import TeacherForcingLoss
from longlive_jax.training.stages.dit_training import DiTTraining
from longlive_jax.training.stages.preview import Preview
from longlive_jax.typing import Array, Params

__all__ = ["evaluation"]


def evaluation(
    trained: DiTTraining,
    frozen: Mapping[str, Params],
    loss: TeacherForcingLoss,
    preview: Preview,
    held_out: Callable[[], Iterator[Any]],
    *,
    one_device: bool = False,
) -> Callable[[Mapping[str, Params], int, Path], dict[str, float]]:
    """The `evaluate` of a task; metrics are those of the EMA, in the run's precision.

    Args:
      trained: what is trained.
      frozen: `trained.frozen()`.
      loss: the loss, without recycling.
      preview: videos to sample.
      held_out: the batches to measure the loss on, the same at every call; draws are the same too.
      one_device: whether the loss is computed on one device, from parameters gathered to it.
    """

    @jax.jit
    def measure(weights: Params, frozen: Mapping[str, Params], batch: Any, key: Array):
        _, (metrics, _) = loss(trained.evaluated(weights, frozen, key), batch, key)
        return metrics

    def evaluate(weights: Mapping[str, Params], step: int, workdir: Path) -> dict[str, float]:
        params = (weights[trained.name], frozen)
        preview.write(trained.sampled(*params), step, workdir)
        params = gather_to_hosts(params) if one_device else params
        metrics = [measure(*params, batch, jax.random.key(i)) for i, batch in enumerate(held_out())]
        return {f"held_out_{k}": x for k, x in mean_metrics(metrics).items()} if metrics else {}

    return evaluate
