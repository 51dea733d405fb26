"""What a run trains: updates, data, evaluation and export."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.parallel.mesh import BATCH
from longlive_jax.training.feed import Feed, device_put_batch, process_rows
from longlive_jax.training.update import Trainer
from longlive_jax.typing import Params

SAMPLES = P(BATCH)
"""Every array of a batch split by its samples."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """Where batches come from and how they get to the devices.

    Attributes:
      feed: step -> the batches from that step on, each a function of its step; dictionaries of
        arrays, samples first.
      put: host batch of this process -> batch on the mesh.
      first_row: first row of a global batch that `feed` gives this process.
    """

    feed: Callable[[int], Feed]
    put: Callable[[Any], Any]
    first_row: int = 0


def global_batches(feed: Callable[[int], Feed], mesh: Mesh, specs: Any = SAMPLES) -> Batches:
    """Batches whose rows every process creates in full; `specs` is a prefix of a batch's tree."""

    def put(batch: Any) -> Any:
        return device_put_batch(batch, specs, mesh, rows=len(jax.tree.leaves(batch)[0]))

    return Batches(feed, put)


def process_batches(
    feed: Callable[[int], Feed], mesh: Mesh, specs: Any, *, batch_size: int
) -> Batches:
    """Batches of `batch_size` rows, of which every process creates only its own."""
    first = process_rows(mesh, batch_size).start

    def put(batch: Any) -> Any:
        return device_put_batch(batch, specs, mesh, rows=batch_size, first=first)

    return Batches(feed, put, first)


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Size of one training step.

    Attributes:
      tokens: tokens that pass through the model.
      flops: FLOPs of its matrix products, forward and backward, recomputation not counted.
      kinds: parts of `flops` by name.
    """

    tokens: int
    flops: float
    kinds: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class About:
    """What a run reports and records about itself.

    Attributes:
      origin: identity of its data and settings, ready for JSON; stored with every checkpoint and
        compared on resuming.
      notes: lines printed before the first step.
      cost: size of a step, to log rates.
    """

    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    cost: StepCost | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, on which data, and how it is evaluated and exported.

    Attributes:
      trainer: initial state and compiled updates of named groups of parameters.
      batches: batches of data, by step.
      evaluate: (weights by group, step, workdir) -> numbers; may write pictures to the workdir.
      export: (weights by group, directory) -> lines for the user, or None; writes the trained model
        to the directory.
      updates: step -> groups updated in that step, in order; None: all groups in every step.
      frozen: parameters that no update changes, by name, on the mesh; neither donated nor saved.
      about: origin, notes and cost.
    """

    trainer: Trainer
    batches: Batches
    evaluate: Callable[[Mapping[str, Params], int, pathlib.Path], dict[str, float]]
    export: Callable[[Mapping[str, Params], pathlib.Path], Sequence[str] | None]
    updates: Callable[[int], tuple[str, ...]] | None = None
    frozen: Mapping[str, Params] = dataclasses.field(default_factory=dict)
    about: About = dataclasses.field(default_factory=About)

    def __post_init__(self) -> None:
        """Losses get frozen parameters and other groups in one mapping, so names must differ."""
        if both := sorted(set(self.frozen) & set(self.trainer.abstract.groups)):
            raise ValueError(f"{both} are both frozen and trained; rename the frozen parameters")

    def updates_at(self, step: int) -> tuple[str, ...]:
        """Groups to update next, after `step` completed steps."""
        return tuple(self.trainer.abstract.groups) if self.updates is None else self.updates(step)
