"""The AR loss over a mesh: Balanced SP, parameters shared out, the same numbers as one device.

What is random is drawn for the whole batch before it is split, so no result depends on the mesh.
The rest runs inside one `shard_map` over all axes, where every device calls the same `predict` on
its own frames; differentiate outside of it.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.models.params import with_params
from longlive_jax.parallel.balanced import paired
from longlive_jax.parallel.fsdp import Gather
from longlive_jax.parallel.mesh import AXES, BATCH, SP
from longlive_jax.parallel.rules import Specs
from longlive_jax.parallel.ulysses import exchange, ulysses, whole
from longlive_jax.training.objectives.teacher_forcing import (
    ARSetup,
    Draws,
    LossOutput,
    TeacherForcingBatch,
    Text,
    draw,
    flow_loss,
    predict,
)
from longlive_jax.typing import Array, Float, Key, Params

FRAMES = P(BATCH, SP)
"""Samples over data and fsdp, frames (or chunks) over sp."""

COLUMNS = ("chunk_index", "start", "window_start", "sink", "prompt")
"""Of an `TeacherForcingBatch`: context chunks, then target chunks."""


BATCH_SPECS = dict.fromkeys(("context", "target", "mask"), FRAMES) | {
    name: P(BATCH) for name in COLUMNS
}
"""PartitionSpecs of a batch's arrays, by field of `TeacherForcingBatch`."""


def _specs(cls: type, **other: P) -> Any:
    """An Episode or Draws of specs."""
    return cls(**{f.name: other.get(f.name, FRAMES) for f in dataclasses.fields(cls)})


def _arrange_balanced(
    batch: TeacherForcingBatch, shown: TeacherForcingBatch, draws: Draws, parts: int
) -> tuple[TeacherForcingBatch, TeacherForcingBatch, Draws]:
    return batch, balanced(shown, parts), draws


@dataclasses.dataclass(frozen=True)
class SequenceLayout:
    """How the frames of a sequence are divided over the sp axis.

    Attributes:
      arrange: (target batch, model batch, draws, number of shards) -> the same three in the order
        of the shards; frames may be added in front of the targets.
      on_shard: (model batch, draws) -> the same two, on a shard's own frames inside `shard_map`.
    """

    arrange: Callable[
        [TeacherForcingBatch, TeacherForcingBatch, Draws, int],
        tuple[TeacherForcingBatch, TeacherForcingBatch, Draws],
    ]
    on_shard: Callable[[TeacherForcingBatch, Draws], tuple[TeacherForcingBatch, Draws]] = (
        lambda batch, draws: (
            batch,
            draws,
        )
    )


BALANCED = SequenceLayout(_arrange_balanced)
"""Every device has the clean and the noisy frames of the same times (paper, section 2.1)."""


@dataclasses.dataclass(frozen=True)
class ShardedLoss:
    """How a loss is shared out.

    Attributes:
      mesh: axes data, fsdp, sp.
      specs: PartitionSpecs of the parameters.
      gather: makes parameters whole where they are used; None: `Gather(specs)`.
      exchange: the all-to-all of attention.
      layout: which frames each device has.
    """

    mesh: Mesh
    specs: Specs
    gather: Gather | None = None
    exchange: Callable[..., Array] = exchange
    layout: SequenceLayout = BALANCED


def sharded_ar_loss(
    setup: ARSetup,
    shared: ShardedLoss,
    params: Params,
    batch: TeacherForcingBatch,
    key: Key[Array, ""],
    text: Text,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`ar_loss` of a batch over a mesh; context and target must split into sp parts of chunks."""
    draws = draw(key, batch, chunk_frames=setup.chunk_frames, spec=setup.spec)
    loss, metrics, _ = sharded_forward(setup, shared, params, batch, batch, draws, text)
    return loss, metrics


def sharded_forward(
    setup: ARSetup,
    shared: ShardedLoss,
    params: Params,
    batch: TeacherForcingBatch,
    shown: TeacherForcingBatch,
    draws: Draws,
    text: Text,
) -> LossOutput:
    """`forward` of a batch over a mesh."""
    arranged = shared.layout.arrange(batch, shown, draws, shared.mesh.shape[SP])
    frames = arranged[0].target.shape[1] - batch.target.shape[1]
    batch, shown, draws = arranged
    over = jax.shard_map(
        _local_forward(setup, shared),
        mesh=shared.mesh,
        in_specs=(
            shared.specs,
            jax.tree.map(lambda _: FRAMES, shown),
            FRAMES,
            _specs(Draws, dropped=P(BATCH)),
            P() if text.ndim == 3 else P(BATCH),
        ),
        out_specs=(P(), P(), FRAMES),
        check_vma=False,
    )
    loss, metrics, velocity = over(params, shown, batch.target, draws, text)
    return loss, metrics, velocity[:, frames:]


def balanced(batch: TeacherForcingBatch, parts: int) -> TeacherForcingBatch:
    """The batch with its columns in the order of the devices: context and target of each."""
    chunks = batch.chunk_index.shape[1]
    frames = batch.context.shape[1] + batch.target.shape[1]
    first = chunks * batch.context.shape[1] // frames
    for name, count in (("context", first), ("target", chunks - first)):
        if count % parts:
            raise ValueError(
                f"{count} {name} chunks do not split over mesh.sp = {parts}; choose a divisor"
            )
    columns = {name: getattr(batch, name) for name in COLUMNS}
    columns = {k: paired(x[:, :first], x[:, first:], parts) for k, x in columns.items()}
    return dataclasses.replace(batch, **columns)


def _local_forward(setup: ARSetup, shared: ShardedLoss):
    """The prediction for a device's own frames, and the loss normalised over all."""
    gather = shared.gather or Gather(shared.specs)

    def forward(
        params: Params, shown: TeacherForcingBatch, target: Array, draws: Draws, text: Array
    ) -> LossOutput:
        shown, draws = shared.layout.on_shard(shown, draws)
        apart = {k: v for k, v in params.items() if k != "blocks"}
        ready = gather.tree(apart, {k: shared.specs[k] for k in apart})
        velocity = predict(
            setup,
            with_params(setup.graphdef, {**ready, "blocks": params["blocks"]}),
            shown,
            draws,
            text,
            whole=whole,
            wrap=partial(ulysses, exchange=shared.exchange),
            materialize=gather,
        )
        batch = dataclasses.replace(shown, target=target)
        total = partial(lax.psum, axis_name=AXES)
        return *flow_loss(velocity, batch, draws, total=total), velocity

    return forward
