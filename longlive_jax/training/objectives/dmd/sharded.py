"""The two losses of distillation over a mesh, with results as on one device.

Everything random is drawn for the global batch before it is split, so no result depends on the
mesh. The rest runs inside one `shard_map` over all axes: samples are divided over data and fsdp,
the tokens of the model over sp (`split_dit`), parameters over fsdp and sp. Gradients must be taken
outside of the `shard_map`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.models.params import with_params
from longlive_jax.models.wan.dit import DiT
from longlive_jax.parallel.fsdp import Gather
from longlive_jax.parallel.mesh import BATCH, SHARDS, SP, MeshSpec, check_fits
from longlive_jax.parallel.rules import Specs, check_divides
from longlive_jax.quant.frozen import frozen_specs
from longlive_jax.quant.low_rank import LoRAKernel, LowRank, has_product, with_branches
from longlive_jax.quant.policy import kernel_path
from longlive_jax.training.objectives.dmd.draws import RolloutDraws, ScoreDraws
from longlive_jax.training.objectives.dmd.losses import (
    DMDSetup,
    Shards,
    critic_loss,
    generator_loss,
)
from longlive_jax.training.objectives.dmd.rollout import Scene
from longlive_jax.training.objectives.dmd.split_dit import SplitDiT, head_cache, tokens_by_device
from longlive_jax.training.update import Metrics
from longlive_jax.typing import Array, Float, Params
from pallas_kernels.attention import AttentionFn
from pallas_kernels.tokens import Tokens

__all__ = ["ShardedDMD", "role_specs", "sharded_critic_loss", "sharded_generator_loss"]


@dataclasses.dataclass(frozen=True)
class ShardedDMD:
    """How the losses are sharded.

    Attributes:
      mesh: devices, with axes data, fsdp and sp.
      specs: PartitionSpecs of the model's arrays, kernels `[layers, i, o]`; those of each role's
        parameters follow from them (`role_specs`).
    """

    mesh: Mesh
    specs: Specs


def sharded_generator_loss(
    setup: DMDSetup,
    student: Params,
    teacher: Params,
    critic: Params,
    scene: Scene,
    negative: Float[Array, "b 1 t e"],
    rollout_draws: RolloutDraws,
    score_draws: ScoreDraws,
    *,
    sharded: ShardedDMD,
) -> tuple[Float[Array, ""], Metrics]:
    """`generator_loss` over a mesh.

    Raises ValueError, before compilation, if heads, chunks, the frames of a chunk, the batch or
    parameters do not divide over the mesh.
    """
    roles, draws = (student, teacher, critic), (rollout_draws, score_draws)
    return _over_mesh(generator_loss, setup, sharded, roles, (scene, negative), draws)


def sharded_critic_loss(
    setup: DMDSetup,
    student: Params,
    critic: Params,
    scene: Scene,
    rollout_draws: RolloutDraws,
    score_draws: ScoreDraws,
    *,
    sharded: ShardedDMD,
) -> tuple[Float[Array, ""], Metrics]:
    """`critic_loss` over a mesh; it raises like `sharded_generator_loss`."""
    roles, draws = (student, critic), (rollout_draws, score_draws)
    return _over_mesh(critic_loss, setup, sharded, roles, (scene,), draws)


def role_specs(params: Params, specs: Specs) -> Specs:
    """PartitionSpecs of a role's parameters, from those of the model's arrays.

    Packed kernels follow the arrays that they replace. The factors of branches are sharded along
    the widths of the model, as in `rules.ADAPTER`; keys are replicated.
    """
    branches: dict[str, LowRank] = {}

    def take_branch(keys: tuple, node: Any) -> Any:
        branch = getattr(node, "branch", None)
        if branch is None:
            return node
        branches[kernel_path(keys)] = _branch_specs(branch)
        return (
            node.kernel if isinstance(node, LoRAKernel) else dataclasses.replace(node, branch=None)
        )

    plain = jax.tree_util.tree_map_with_path(take_branch, params, is_leaf=has_product)
    return with_branches(frozen_specs(plain, specs), branches)


def _branch_specs(branch: LowRank) -> LowRank:
    layers, replicated = (None,) * (branch.a.ndim - 2), P()
    factors: Any = {"a": P(*layers, SHARDS), "b": P(*layers, None, SHARDS)}
    dropout: Any = branch.dropout
    if dropout is not None:
        dropout = dataclasses.replace(dropout, key=replicated)
    return dataclasses.replace(branch, **factors, dropout=dropout)


def _over_mesh(
    loss: Callable[..., tuple[Array, Metrics]],
    setup: DMDSetup,
    sharded: ShardedDMD,
    roles: tuple[Params, ...],
    scene: tuple[Any, ...],
    draws: tuple[RolloutDraws, ScoreDraws],
) -> tuple[Float[Array, ""], Metrics]:
    """`loss(setup, *roles, *scene, *draws)` with every device on its own part."""
    specs = tuple(role_specs(params, sharded.specs) for params in roles)
    _check(setup, sharded.mesh, roles, specs, batch=len(draws[0].noise))
    context = None if draws[0].context_noise is None else P(BATCH)
    rollout_specs: Any = RolloutDraws(P(BATCH), context, P())  # type: ignore[arg-type]
    over_mesh = jax.shard_map(
        partial(loss, _on_shard(setup, sharded)),
        mesh=sharded.mesh,
        in_specs=(*specs, *(P(BATCH) for _ in scene), rollout_specs, P(BATCH)),
        out_specs=P(),
        check_vma=False,
    )
    return over_mesh(*roles, *scene, *draws)


def _on_shard(setup: DMDSetup, sharded: ShardedDMD) -> DMDSetup:
    """The setup of a device inside `shard_map`."""
    count, streams = sharded.mesh.shape[SP], 2 if setup.scores.context == "clean" else 1

    def around(graphdef: nnx.GraphDef[DiT], params: Params) -> Any:
        # Blocks are gathered one by one as they are used, everything else at once.
        specs = role_specs(params, sharded.specs)
        gather = Gather(specs)
        outer = {k: v for k, v in params.items() if k != "blocks"}
        gathered = gather.tree(outer, {k: specs[k] for k in outer})
        dit = with_params(graphdef, {**gathered, "blocks": params["blocks"]})
        return SplitDiT(dit, gather, count)

    def attention_for(tokens: Tokens) -> AttentionFn:
        return setup.attention_for(tokens_by_device(tokens, count, streams))

    shards = Shards(
        around=around,
        make_cache=partial(head_cache, count=count),
        reduce_sums=partial(lax.psum, axis_name=BATCH),
    )
    return dataclasses.replace(setup, attention_for=attention_for, shards=shards)


def _check(
    setup: DMDSetup, mesh: Mesh, roles: tuple[Params, ...], specs: tuple[Specs, ...], *, batch: int
) -> None:
    """Raises ValueError if anything does not divide over the mesh."""
    check_fits(
        MeshSpec(**mesh.shape),
        heads=with_params(setup.graphdef, roles[0]).cfg.heads,
        chunks=setup.rollout.chunks,
        batch=batch,
        chunk_frames=setup.chunk_frames,
    )
    for params, own in zip(roles, specs, strict=True):
        check_divides(mesh, own, params)
