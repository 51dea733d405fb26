"""The teacher-forcing loss over a mesh: Balanced SP, sharded parameters, results as on one device.

Everything random is drawn for the global batch before it is split, so no result depends on the
mesh. The rest runs inside one `shard_map` over all axes, in which every device calls the same
`predict` on its own frames. Gradients must be taken outside of the `shard_map`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.models.params import with_params
from longlive_jax.parallel.balanced import interleave_shards
from longlive_jax.parallel.fsdp import Gather
from longlive_jax.parallel.mesh import AXES, BATCH, SP
from longlive_jax.parallel.rules import Specs
from longlive_jax.parallel.ulysses import all_gather_tokens, exchange, ulysses
from longlive_jax.training.objectives.batch import Draws, TeacherForcingBatch, draw
from longlive_jax.training.objectives.teacher_forcing import (
    ARSetup,
    LossOutput,
    Shards,
    TextFeatures,
    flow_loss,
    predict,
)
from longlive_jax.training.update import Metrics
from longlive_jax.typing import Array, Float, Key, Params

FRAMES = P(BATCH, SP)
"""Samples over data and fsdp, frames (or chunks) over sp."""

CHUNK_COLUMNS = ("chunk_index", "start", "window_start", "sink", "prompt")
"""Fields of a `TeacherForcingBatch` with one value per chunk: context, then target chunks."""

BATCH_SPECS = dict.fromkeys(("context", "target", "mask"), FRAMES) | {
    name: P(BATCH) for name in CHUNK_COLUMNS
}
"""PartitionSpecs of a batch's arrays, by field of `TeacherForcingBatch`."""


@dataclasses.dataclass(frozen=True)
class SequenceLayout:
    """How the frames of a sequence are divided over the sp axis.

    Attributes:
      arrange: (target batch, model batch, draws, number of shards) -> the same three in the order
        of the shards; frames may be added in front of the targets.
      order: (context, target, number of shards) -> a column of both in the order of the shards.
      on_shard: (model batch, draws) -> the same two, on a shard's own frames inside `shard_map`.
    """

    arrange: Callable[
        [TeacherForcingBatch, TeacherForcingBatch, Draws, int],
        tuple[TeacherForcingBatch, TeacherForcingBatch, Draws],
    ]
    order: Callable[[Any, Any, int], Any]
    on_shard: Callable[[TeacherForcingBatch, Draws], tuple[TeacherForcingBatch, Draws]] = (
        lambda *own: own
    )


def balanced(batch: TeacherForcingBatch, num_shards: int) -> TeacherForcingBatch:
    """The batch with its columns in the order of the shards: context and target chunks of each.

    Raises ValueError if context or target chunks do not divide over the shards.
    """
    chunks = batch.chunk_index.shape[1]
    frames = batch.context.shape[1] + batch.target.shape[1]
    first = chunks * batch.context.shape[1] // frames
    for name, count in (("context", first), ("target", chunks - first)):
        if count % num_shards:
            raise ValueError(
                f"{count} {name} chunks do not divide over mesh.sp = {num_shards}; choose a divisor"
            )
    columns = {name: getattr(batch, name) for name in CHUNK_COLUMNS}
    columns = {
        k: interleave_shards(x[:, :first], x[:, first:], num_shards) for k, x in columns.items()
    }
    return dataclasses.replace(batch, **columns)


BALANCED = SequenceLayout(
    lambda target_batch, model_batch, draws, num_shards: (
        target_batch,
        balanced(model_batch, num_shards),
        draws,
    ),
    order=partial(interleave_shards, axis=0),
)
"""Every device has the clean and the noisy frames of the same times (paper, section 2.1)."""


@dataclasses.dataclass(frozen=True)
class ShardedLoss:
    """How a loss is sharded.

    Attributes:
      mesh: devices, with axes data, fsdp and sp.
      specs: PartitionSpecs of the parameters.
      gather: all-gathers parameters where they are used; None: `Gather(specs)`.
      exchange: the all-to-all of attention.
      layout: which frames each device has.
    """

    mesh: Mesh
    specs: Specs
    gather: Gather | None = None
    exchange: Callable[..., Array] = exchange
    layout: SequenceLayout = BALANCED


def sharded_teacher_forcing_loss(
    setup: ARSetup,
    sharded: ShardedLoss,
    params: Params,
    batch: TeacherForcingBatch,
    key: Key[Array, ""],
    text_features: TextFeatures,
) -> tuple[Float[Array, ""], Metrics]:
    """`teacher_forcing_loss` over a mesh; context and target chunks must divide over sp."""
    draws = draw(key, batch, chunk_frames=setup.chunk_frames, spec=setup.spec)
    loss, metrics, _ = sharded_forward(
        setup, params, batch, batch, draws, text_features, sharded=sharded
    )
    return loss, metrics


def sharded_forward(
    setup: ARSetup,
    params: Params,
    target_batch: TeacherForcingBatch,
    model_batch: TeacherForcingBatch,
    draws: Draws,
    text_features: TextFeatures,
    *,
    sharded: ShardedLoss,
) -> LossOutput:
    """`teacher_forcing.forward` over a mesh."""
    # 1. The frames in the order of the shards.
    num_shards, num_targets = sharded.mesh.shape[SP], target_batch.target.shape[1]
    target_batch, model_batch, draws = sharded.layout.arrange(
        target_batch, model_batch, draws, num_shards
    )
    added = target_batch.target.shape[1] - num_targets

    # 2. Prediction and loss, every device on its own frames.
    over_mesh = jax.shard_map(
        partial(_forward_on_shard, setup, sharded),
        mesh=sharded.mesh,
        in_specs=(
            sharded.specs,
            jax.tree.map(lambda _: FRAMES, model_batch),
            FRAMES,
            _draw_specs(),
            P() if text_features.ndim == 3 else P(BATCH),
        ),
        out_specs=(P(), P(), FRAMES),
        check_vma=False,
    )
    loss, metrics, velocity = over_mesh(
        params, model_batch, target_batch.target, draws, text_features
    )
    return loss, metrics, velocity[:, added:]


def _forward_on_shard(
    setup: ARSetup,
    sharded: ShardedLoss,
    params: Params,
    model_batch: TeacherForcingBatch,
    target: Array,
    draws: Draws,
    text_features: Array,
) -> LossOutput:
    """The prediction for a device's own frames, and the loss over the frames of all devices."""
    model_batch, draws = sharded.layout.on_shard(model_batch, draws)

    # Blocks are gathered one by one as they are used, everything else at once.
    gather = sharded.gather or Gather(sharded.specs)
    outer = {k: v for k, v in params.items() if k != "blocks"}
    gathered = gather.tree(outer, {k: sharded.specs[k] for k in outer})
    velocity = predict(
        setup,
        with_params(setup.graphdef, {**gathered, "blocks": params["blocks"]}),
        model_batch,
        draws,
        text_features,
        shards=_shards(sharded),
        materialize=gather,
    )
    target_batch = dataclasses.replace(model_batch, target=target)
    reduce_sums = partial(lax.psum, axis_name=AXES)
    return *flow_loss(velocity, target_batch, draws, reduce_sums=reduce_sums), velocity


def _shards(sharded: ShardedLoss) -> Shards:
    count = sharded.mesh.shape[SP]

    def order(column: np.ndarray) -> np.ndarray:
        context, target = np.split(column, 2)
        return sharded.layout.order(context, target, count)

    return Shards(
        count,
        order=order,
        gather_tokens=all_gather_tokens,
        wrap_attention=partial(ulysses, exchange=sharded.exchange),
    )


def _draw_specs() -> Any:
    """PartitionSpecs of `Draws`."""
    per_sample: dict[str, Any] = {"dropped": P(BATCH)}
    return Draws(**{f.name: per_sample.get(f.name, FRAMES) for f in dataclasses.fields(Draws)})
