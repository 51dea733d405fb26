"""Conversion between NNX modules and their parameters as pure nested dictionaries.

Training, checkpoints and jitted functions carry `Params`; a module is rebuilt around them where it
is called. Lists of submodules have integer keys, as in NNX.

    graphdef, params = abstract(lambda: DiT(config, rngs=nnx.Rngs(0)))   # nothing is allocated
    velocity, _ = with_params(graphdef, params)(latents, ...)
"""

from collections.abc import Callable

import jax
from flax import nnx

from longlive_jax.typing import Params

__all__ = ["abstract", "params_of", "with_params"]


def params_of(model: nnx.Module) -> Params:
    """The parameters of a module as pure nested dictionaries of arrays, not copied."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def with_params[M: nnx.Module](model: M | nnx.GraphDef[M], params: Params) -> M:
    """A module with the structure of `model` (a module or its graph definition) and `params`.

    It copies no array, so it is cheap enough to call inside jitted or differentiated functions.
    """
    graphdef = model if isinstance(model, nnx.GraphDef) else nnx.graphdef(model)
    return nnx.merge(graphdef, nnx.State(params))


def abstract[M: nnx.Module](make: Callable[[], M]) -> tuple[nnx.GraphDef[M], Params]:
    """Graph definition and `jax.ShapeDtypeStruct` parameters of `make()`; allocates nothing."""
    holder: list[nnx.GraphDef[M]] = []

    def parameters() -> Params:
        model = make()
        holder.append(nnx.graphdef(model))
        return params_of(model)

    shapes = jax.eval_shape(parameters)
    return holder[0], shapes
