"""Which part of every parameter a device holds: one table from path to PartitionSpec."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.parallel.mesh import SHARDS

type Specs = Any
"""A tree of PartitionSpec."""

type Rules = Iterable[tuple[str, P]]

_INPUTS, _OUTPUTS = P(SHARDS), P(None, SHARDS)
DIT: tuple[tuple[str, P], ...] = (
    (r"blocks/.*/(q|k|v|up)/kernel", P(None, None, SHARDS)),
    (r"blocks/.*/(o|down)/kernel", P(None, SHARDS)),
    (r"(text_embedding/fc\d|time_embedding/fc\d|time_projection|patch_embedding)/kernel", _OUTPUTS),
    (r"head/linear/kernel", _INPUTS),
    (r".*/(bias|scale|modulation)", P()),
)
"""The DiT: every matrix is split over fsdp and sp, vectors (0.1 % of it) are whole everywhere."""


def specs_for(rules: Rules, tree: Any) -> Specs:
    """The PartitionSpec of every leaf by the first rule that matches its whole path.

    Paths join keys by slashes. Raises ValueError for the paths that no rule matches, all at once.
    """
    compiled = [(re.compile(pattern), spec) for pattern, spec in rules]
    missing: list[str] = []

    def spec_of(keys: tuple, _leaf: Any) -> P:
        path = path_of(keys)
        for pattern, spec in compiled:
            if pattern.fullmatch(path):
                return spec
        missing.append(path)
        return P()

    found = jax.tree_util.tree_map_with_path(spec_of, tree)
    if missing:
        raise ValueError(f"no sharding rule for {', '.join(missing)}; add one to the table")
    return found


def path_of(keys: tuple) -> str:
    """`blocks/ffn/up/kernel` for a key path of dictionaries, dataclasses and sequences."""
    return "/".join(str(_name(key)) for key in keys)


def _name(key: Any) -> Any:
    for kind in ("key", "name", "idx"):
        if hasattr(key, kind):
            return getattr(key, kind)
    return key


def check_divides(mesh: Mesh, specs: Specs, tree: Any) -> None:
    """ValueError naming the first array whose split axis is no multiple of the devices it has."""

    def check(keys: tuple, leaf: Any, spec: P) -> None:
        for size, names in zip(leaf.shape, spec, strict=False):
            parts = parts_of(mesh.shape, names)
            if size % parts:
                raise ValueError(
                    f"{path_of(keys)} {leaf.shape}: an axis of {size} does not split into {parts} "
                    f"({names}); choose mesh axes whose product divides it"
                )

    jax.tree_util.tree_map_with_path(check, tree, specs)


def parts_of(sizes: Mapping[str, int], names: str | tuple[str, ...] | None) -> int:
    """Devices along one entry of a PartitionSpec."""
    parts = 1
    for name in (names,) if isinstance(names, str) else names or ():
        parts *= sizes[name]
    return parts


def shardings(mesh: Mesh, specs: Specs) -> Any:
    """NamedShardings of a tree of specs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def init_sharded(
    init: Callable[[jax.Array], Any], key: jax.Array, mesh: Mesh, rules: Rules
) -> tuple[Any, Specs]:
    """Parameters made where they stay, never whole on one device, and their specs.

    Raises ValueError for parameters that no rule names or that do not split.
    """
    shapes = jax.eval_shape(init, key)
    specs = specs_for(rules, shapes)
    check_divides(mesh, specs, shapes)
    return jax.jit(init, out_shardings=shardings(mesh, specs))(key), specs


def moment_specs(tx: optax.GradientTransformation, params: Any, specs: Specs) -> Specs:
    """Specs of `tx.init(params)`: moments as their parameters, all else whole everywhere.

    An array is the moment of a parameter if its path ends like that one's and the shapes agree.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    names = [(path_of(keys), leaf.shape) for keys, leaf in leaves]
    known = list(zip(names, jax.tree.leaves(specs, is_leaf=_is_spec), strict=True))

    def spec_of(keys: tuple, leaf: Any) -> P:
        path = "/" + path_of(keys)
        found = [
            x for (name, shape), x in known if path.endswith("/" + name) and leaf.shape == shape
        ]
        return found[0] if found else P()

    return jax.tree_util.tree_map_with_path(spec_of, jax.eval_shape(tx.init, params))


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)
