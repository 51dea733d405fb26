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
from longlive_jax.training.ar import (
    ARSetup,
    Draws,
    Episode,
    Judged,
    Text,
    draw,
    flow_loss,
    predict,
)
from longlive_jax.training.naive import in_one_line, without_context
from longlive_jax.typing import Array, Float, Key, Params

FRAMES = P(BATCH, SP)
"""Samples over data and fsdp, frames (or chunks) over sp."""

COLUMNS = ("chunk", "start", "since", "sink", "prompt")
"""Of an `Episode`: context chunks, then target chunks."""


def _specs(cls: type, **other: P) -> Any:
    """An Episode or Draws of specs."""
    return cls(**{f.name: other.get(f.name, FRAMES) for f in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class Shared:
    """How a loss is shared out.

    Attributes:
      mesh: axes data, fsdp, sp.
      specs: PartitionSpecs of the parameters.
      gather: makes parameters whole where they are used; None: `Gather(specs)`.
      exchange: the all-to-all of attention.
      balanced: every device has clean and noisy frames of the same times. Else the sequence is cut
        as it is (`naive`), for comparison; attention is the same, in another order.
    """

    mesh: Mesh
    specs: Specs
    gather: Gather | None = None
    exchange: Callable[..., Array] = exchange
    balanced: bool = True


def shared_ar_loss(
    setup: ARSetup, shared: Shared, params: Params, batch: Episode, key: Key[Array, ""], text: Text
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`ar_loss` of a batch over a mesh; context and target must split into sp parts of chunks."""
    draws = draw(key, batch, chunk=setup.chunk, spec=setup.spec)
    loss, metrics, _ = shared_forward(setup, shared, params, batch, batch, draws, text)
    return loss, metrics


def shared_forward(
    setup: ARSetup,
    shared: Shared,
    params: Params,
    batch: Episode,
    shown: Episode,
    draws: Draws,
    text: Text,
) -> Judged:
    """`forward` of a batch over a mesh."""
    parts, frames = shared.mesh.shape[SP], 0
    if shared.balanced:
        shown = balanced(shown, parts)
    else:
        frames = shown.context.shape[1]
        judged, _ = in_one_line(batch, draws)
        shown, draws = in_one_line(shown, draws)
        batch = judged
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


def balanced(batch: Episode, parts: int) -> Episode:
    """The batch with its columns in the order of the devices: context and target of each."""
    chunks = batch.chunk.shape[1]
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


def _local_forward(setup: ARSetup, shared: Shared):
    """The prediction for a device's own frames, and the loss normalised over all."""
    gather = shared.gather or Gather(shared.specs)

    def forward(params: Params, shown: Episode, target: Array, draws: Draws, text: Array) -> Judged:
        if not shared.balanced:
            shown, draws = without_context(shown, draws)
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
            unpack=gather,
        )
        batch = dataclasses.replace(shown, target=target)
        total = partial(lax.psum, axis_name=AXES)
        return *flow_loss(velocity, batch, draws, total=total), velocity

    return forward
