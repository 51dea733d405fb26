"""`--mesh=data=8,sp=4`: a mesh by its axes."""

from typing import TYPE_CHECKING

from longlive_jax.spec import UserError, build, nearest

if TYPE_CHECKING:
    from longlive_jax.parallel.mesh import MeshSpec


def mesh_of(text: str) -> "MeshSpec":
    """Axes and their sizes; an axis that is not named is 1. UserError for anything else."""
    from longlive_jax.parallel.mesh import AXES, MeshSpec

    axes: dict[str, int] = {}
    for word in filter(None, text.split(",")):
        name, _, number = word.partition("=")
        if name not in AXES:
            raise UserError(f"--mesh: unknown axis {name!r}{nearest(name, AXES)}")
        if name in axes:
            raise UserError(f"--mesh: {name} is given twice")
        if not number.isdecimal():
            raise UserError(f"--mesh: expected {name}=NUMBER, got {word!r}")
        axes[name] = int(number)
    return build(MeshSpec, axes, path="--mesh")
