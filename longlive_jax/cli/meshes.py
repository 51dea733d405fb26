"""Parses `--mesh=data=8,sp=4`, the number of devices along each axis of a mesh."""

from typing import TYPE_CHECKING

from longlive_jax.spec import UserError, build, nearest

if TYPE_CHECKING:
    from longlive_jax.parallel.mesh import MeshSpec


def parse_mesh(text: str) -> "MeshSpec":
    """Parses `AXIS=NUMBER,...`; axes that are not named have size 1. Raises UserError."""
    from longlive_jax.parallel.mesh import AXES, MeshSpec

    axes: dict[str, int] = {}
    for word in filter(None, text.split(",")):
        name, _, number = word.partition("=")
        if name not in AXES:
            raise UserError(f"--mesh: unknown axis {name!r}{nearest(name, AXES)}")
        if name in axes:
            raise UserError(f"--mesh: axis {name!r} appears twice")
        if not number.isdecimal():
            raise UserError(f"--mesh: expected {name}=NUMBER, got {word!r}")
        axes[name] = int(number)
    return build(MeshSpec, axes, path="--mesh")
