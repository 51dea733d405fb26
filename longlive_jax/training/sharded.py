"""The AR loss over a mesh: Balanced SP, parameters shared out, the same numbers as one device.

What is random is drawn for the whole batch before it is split, so no result depends on the mesh.
The rest runs inside one `shard_map` over all axes, where every device calls the same `predict` on
its own frames; differentiate outside of it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.models.params import with_params
from longlive_jax.models.wan.dit import DiT
from longlive_jax.parallel.balanced import paired
from longlive_jax.parallel.fsdp import Gather
from longlive_jax.parallel.mesh import AXES, BATCH, SP
from longlive_jax.parallel.rules import Specs
from longlive_jax.parallel.ulysses import exchange, ulysses, whole
from longlive_jax.training.ar import ARLossSpec, Draws, Episode, draw, flow_loss, predict
from longlive_jax.typing import Array, Float, Key, Params
from pallas_kernels.attention import AttentionFn, attention

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
    """

    mesh: Mesh
    specs: Specs
    gather: Gather | None = None
    exchange: Callable[..., Array] = exchange


def shared_ar_loss(
    graphdef: nnx.GraphDef[DiT],
    params: Params,
    batch: Episode,
    key: Key[Array, ""],
    *,
    text: Float[Array, "p t e"],
    empty_prompt: int,
    chunk: int,
    spec: ARLossSpec,
    shared: Shared,
    attend: AttentionFn = attention,
    unroll: int = 1,
    remat: bool = False,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`ar_loss` of a batch over a mesh; context and target must split into sp parts of chunks."""
    draws = draw(key, batch, chunk=chunk, spec=spec)
    loss = _local_loss(
        graphdef,
        shared,
        empty_prompt=empty_prompt,
        chunk=chunk,
        global_sinks=spec.global_sinks,
        attend=attend,
        unroll=unroll,
        remat=remat,
    )
    over = jax.shard_map(
        loss,
        mesh=shared.mesh,
        in_specs=(shared.specs, _specs(Episode), _specs(Draws, dropped=P(BATCH)), P()),
        out_specs=(P(), P()),
        check_vma=False,
    )
    return over(params, balanced(batch, shared.mesh.shape[SP]), draws, text)


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


def _local_loss(graphdef, shared: Shared, *, attend: AttentionFn, **options: Any):
    """The loss of a device's own frames, normalised over all."""
    gather = shared.gather or Gather(shared.specs)

    def loss(params: Params, batch: Episode, draws: Draws, text: Array):
        apart = {k: v for k, v in params.items() if k != "blocks"}
        ready = gather.tree(apart, {k: shared.specs[k] for k in apart})
        velocity = predict(
            with_params(graphdef, {**ready, "blocks": params["blocks"]}),
            batch,
            draws,
            text=text,
            attend=ulysses(attend, exchange=shared.exchange),
            whole=whole,
            unpack=gather,
            **options,
        )
        return flow_loss(velocity, batch, draws, total=lambda sums: lax.psum(sums, AXES))

    return loss
