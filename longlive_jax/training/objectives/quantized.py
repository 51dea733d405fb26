"""Precision of a run: the config's policy, checked against model, mesh and number of tokens."""

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
    """Quantization of the parameters `shapes`, sharded as `specs`, in training.

    `rows` is the number of rows of each kind that one sample has in the linears' inputs. The
    Hadamard transform of the weight gradients mixes groups of 16 rows, so every sp shard must hold
    complete groups: then they are the same on every mesh.

    Raises UserError where shards split groups, for a policy that does not train or does not fit the
    model, and for an implementation that is not available here.
    """
    try:
        quant = QuantizedTraining.of(spec, AXES if mesh.size > 1 else ())
        quant.describe(shapes)  # raises if the policy does not fit the model
        quant = quant.for_shards(specs, shapes, mesh.shape)
    except (ValueError, Unsupported) as error:
        raise UserError(f"config.{error}") from error
    if quant.policy.rules and mesh.size > 1:
        for name, count in rows.items():
            _check_groups(name, count, mesh.shape[SP])
    return quant


def _check_groups(name: str, count: int, ranks: int) -> None:
    if count % (BLOCK * ranks):
        raise UserError(
            f"config.quant.policy: {count} {name} of a sample over mesh.sp = {ranks} do not make "
            f"complete groups of {BLOCK} per device; choose mesh.sp and a latent size that give a "
            f"multiple of {BLOCK * ranks}"
        )
