"""The loss of a run: teacher forcing over any forward pass, with error recycling or without."""

import functools
from collections.abc import Callable
from typing import Any

from longlive_jax.parallel.mesh import MeshSpec
from longlive_jax.training.objectives.error_recycling import (
    RecyclingSpec,
    init_buffers,
    partition,
    recycling_loss,
)
from longlive_jax.training.objectives.teacher_forcing import (
    ARSetup,
    Draws,
    LossOutput,
    TeacherForcingBatch,
    Text,
    draw,
)
from longlive_jax.training.state import Params
from longlive_jax.training.step import LossFn, Metrics, stateless
from longlive_jax.typing import Array, Float, Key

type Forward = Callable[[Params, TeacherForcingBatch, TeacherForcingBatch, Draws, Text], LossOutput]
"""`ar.forward` or `sharded.sharded_forward` with everything bound but what a step brings."""

type Taken = Callable[[dict[str, Array]], tuple[TeacherForcingBatch, Text]]
"""The episode and the texts of a batch."""


def objective(
    setup: ARSetup, run: Forward, taken: Taken, recycling: RecyclingSpec | None = None
) -> LossFn:
    """The loss of a batch's columns; its memory are the error buffers, or ()."""
    if recycling is None:
        return stateless(functools.partial(judged, setup, run, taken))

    def loss(params: Params, batch: dict[str, Array], key: Array, memory: Any):
        episode, text = taken(batch)
        inner = recycling_loss(
            lambda params, batch, used: run(params, batch, used.batch, used.draws, text),
            chunk_frames=setup.chunk_frames,
            spec=recycling,
            loss=setup.spec,
        )
        return inner(params, episode, key, memory)

    return loss


def judged(
    setup: ARSetup,
    run: Forward,
    taken: Taken,
    params: Params,
    batch: dict[str, Array],
    key: Key[Array, ""],
) -> tuple[Float[Array, ""], Metrics]:
    """Loss and metrics without recycling."""
    episode, text = taken(batch)
    draws = draw(key, episode, chunk_frames=setup.chunk_frames, spec=setup.spec)
    value, metrics, _ = run(params, episode, episode, draws, text)
    return value, metrics


def remembered(
    spec: RecyclingSpec | None, chunk_frames: tuple[int, ...], mesh: MeshSpec
) -> dict[str, Any]:
    """The error buffers of a `Task`, for chunks of shape (m, h, w, c); nothing without a spec."""
    if spec is None:
        return {}
    specs = partition(spec, mesh.samples)
    return {"memory": lambda: init_buffers(spec, chunk_frames), "memory_specs": specs}
