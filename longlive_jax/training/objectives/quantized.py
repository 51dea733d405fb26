"""A run's precision: the policy of its config, checked against model, mesh and tokens."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from longlive_jax.parallel.mesh import AXES, SP
from longlive_jax.quant.policy import QuantSpec
from longlive_jax.quant.training import QuantizedTraining
from longlive_jax.spec import UserError
from longlive_jax.training.state import Params
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.nvfp4 import BLOCK

__all__ = ["quantized"]


def quantized(
    spec: QuantSpec, shapes: Params, specs: Any, mesh: Mesh, rows: Mapping[str, int]
) -> QuantizedTraining:
    """How the matrices of `shapes`, which lie as `specs` on the mesh, are quantized in training.

    `rows` says how many tokens of each kind one sample has. Over a mesh every sp rank's share of
    them must be runs of 16 whole, which gradients are rotated over: then the runs are the same on
    every mesh. Raises UserError where it is not so, for a policy that does not train or does not
    fit the model, and for an implementation that this machine has not.
    """
    try:
        quant = QuantizedTraining.of(spec, AXES if mesh.size > 1 else ())
        quant.describe(shapes)  # finds what does not fit the model
        quant.check_parts(specs, shapes, mesh.shape)
    except (ValueError, Unsupported) as error:
        raise UserError(f"config.{error}") from error
    if quant.policy.rules and mesh.size > 1:
        for name, count in rows.items():
            _check_runs(name, count, mesh.shape[SP])
    return quant


def _check_runs(name: str, count: int, ranks: int) -> None:
    if count % (BLOCK * ranks):
        raise UserError(
            f"config.quant.policy: {count} {name} of a sample over mesh.sp = {ranks} are no whole "
            f"runs of {BLOCK} tokens a device; choose a multiple of {BLOCK * ranks}, or mesh.sp "
            "and a latent size that make it one"
        )
