"""Sharding rules: one table from parameter path to PartitionSpec."""

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
"""Rules for the DiT: matrices are sharded over fsdp and sp, vectors (0.1 % of it) replicated."""

ADAPTER: tuple[tuple[str, P], ...] = (
    (r"blocks/.*/a", P(None, SHARDS)),
    (r"blocks/.*/b", P(None, None, SHARDS)),
    (r".*/[ab]", P()),
)
"""Rules for a LoRA of the DiT: sharded along the widths of the model, which a mesh for `DIT`
divides, and never along the rank."""


def specs_for(rules: Rules, tree: Any) -> Specs:
    """PartitionSpec for every leaf, from the first rule whose pattern matches its full path.

    Paths join keys with slashes. Raises ValueError naming all paths that no rule matches.
    """
    compiled = [(re.compile(pattern), spec) for pattern, spec in rules]
    unmatched: list[str] = []

    def spec_of(keys: tuple, _leaf: Any) -> P:
        path = path_of(keys)
        for pattern, spec in compiled:
            if pattern.fullmatch(path):
                return spec
        unmatched.append(path)
        return P()

    specs = jax.tree_util.tree_map_with_path(spec_of, tree)
    if unmatched:
        raise ValueError(f"no sharding rule for {', '.join(unmatched)}; add one to the table")
    return specs


def path_of(keys: tuple) -> str:
    """A key path of dictionaries, dataclasses and sequences as `blocks/ffn/up/kernel`."""
    return "/".join(str(_name(key)) for key in keys)


def _name(key: Any) -> Any:
    for kind in ("key", "name", "idx"):
        if hasattr(key, kind):
            return getattr(key, kind)
    return key


def check_divides(mesh: Mesh, specs: Specs, tree: Any) -> None:
    """Raises ValueError for the first array with an axis that its mesh axes do not divide."""

    def check(keys: tuple, leaf: Any, spec: P) -> None:
        for size, names in zip(leaf.shape, spec, strict=False):
            shards = num_shards(mesh.shape, names)
            if size % shards:
                raise ValueError(
                    f"{path_of(keys)} {leaf.shape}: an axis of {size} does not split into {shards} "
                    f"({names}); choose mesh axes whose product divides it"
                )

    jax.tree_util.tree_map_with_path(check, tree, specs)


def num_shards(sizes: Mapping[str, int], names: str | tuple[str, ...] | None) -> int:
    """Number of shards along one PartitionSpec entry: the product of its mesh axis sizes."""
    shards = 1
    for name in (names,) if isinstance(names, str) else names or ():
        shards *= sizes[name]
    return shards


def shardings(mesh: Mesh, specs: Specs) -> Any:
    """NamedShardings for a tree of PartitionSpecs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def init_sharded(
    init: Callable[[jax.Array], Any], key: jax.Array, mesh: Mesh, rules: Rules
) -> tuple[Any, Specs]:
    """Parameters initialised directly as shards on their devices, and their PartitionSpecs.

    No device ever holds an unsharded copy. Raises ValueError for parameters that no rule matches
    or that do not divide over the mesh.
    """
    shapes = jax.eval_shape(init, key)
    specs = specs_for(rules, shapes)
    check_divides(mesh, specs, shapes)
    return jax.jit(init, out_shardings=shardings(mesh, specs))(key), specs


def moment_specs(tx: optax.GradientTransformation, params: Any, specs: Specs) -> Specs:
    """PartitionSpecs for `tx.init(params)`: moments like their parameters, the rest replicated.

    An array counts as the moment of a parameter if its path ends with that parameter's path and
    their shapes are equal.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    names = [(path_of(keys), leaf.shape) for keys, leaf in leaves]
    known = list(zip(names, jax.tree.leaves(specs, is_leaf=_is_spec), strict=True))

    def spec_of(keys: tuple, leaf: Any) -> P:
        path = "/" + path_of(keys)
        matches = [
            x for (name, shape), x in known if path.endswith("/" + name) and leaf.shape == shape
        ]
        return matches[0] if matches else P()

    return jax.tree_util.tree_map_with_path(spec_of, jax.eval_shape(tx.init, params))


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)
