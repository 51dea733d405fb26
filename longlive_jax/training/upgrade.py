"""Train states of earlier versions.

Those had one unnamed group: `params`, `ema`, `opt_state` and `bad_steps` beside `step`, and
`memory` for the loss state.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from longlive_jax.parallel.rules import path_of

RENAMED_LEAVES = {"loss_state/num_updates": "memory/seen"}
"""Current path of each renamed leaf -> its earlier path."""


def is_earlier(stored: Iterable[str]) -> bool:
    """Whether these paths of arrays are those of an earlier version's state."""
    return not any(path.startswith("groups/") for path in stored)


def earlier_path(path: str) -> str:
    """`groups/dit/ema/...` was `ema/...`, and `loss_state/...` was `memory/...`."""
    if path in RENAMED_LEAVES:
        return RENAMED_LEAVES[path]
    head, *rest = path.split("/")
    if head == "groups":
        return "/".join(rest[1:])
    return "/".join(["memory", *rest]) if head == "loss_state" else path


def earlier_layout(state: Any) -> dict[str, Any]:
    """A current state, or a part of one as dictionaries, in the structure of an earlier version.

    Raises ValueError for a state with several groups.
    """
    layout: dict[str, Any] = {}
    for name, value in _fields(state).items():
        if name == "groups":
            if len(value) > 1:
                raise ValueError(f"it has one group of parameters, this run has {sorted(value)}")
            (group,) = value.values()
            layout |= _fields(group)
        elif name == "loss_state":
            layout["memory"] = _memory(value)
        else:
            layout[name] = value
    return layout


def _fields(node: Any) -> Mapping[str, Any]:
    return node if isinstance(node, Mapping) else vars(node)


def _memory(loss_state: Any) -> Any:
    """A loss state as nested dictionaries with the earlier names."""
    tree: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(loss_state)[0]:
        _, *parents, last = earlier_path(f"loss_state/{path_of(keys)}").split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree or loss_state
