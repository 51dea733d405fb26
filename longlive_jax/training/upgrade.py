"""Paths of a train state in checkpoints of earlier versions.

Those had one unnamed group: `params`, `ema`, `opt_state` and `bad_steps` beside `step`, and
`memory` for the loss state.
"""

from collections.abc import Iterable, Mapping

RENAMED_LEAVES = {"loss_state/num_updates": "memory/seen"}
"""Leaves that have another name today, and their paths then."""


def stored_paths(paths: Iterable[str], stored: Iterable[str]) -> Mapping[str, str]:
    """For each of the state's `paths`, its path in a checkpoint that has the paths `stored`."""
    earlier = not any(path.startswith("groups/") for path in stored)
    return {path: _earlier(path) if earlier else path for path in paths}


def _earlier(path: str) -> str:
    """`groups/dit/ema/...` was `ema/...`, and `loss_state/...` was `memory/...`."""
    if path in RENAMED_LEAVES:
        return RENAMED_LEAVES[path]
    head, *rest = path.split("/")
    if head == "groups":
        return "/".join(rest[1:])
    return "/".join(["memory", *rest]) if head == "loss_state" else path
