"""Adapters on the command line: `--adapter=PATH[:SCALE]`, which may be given several times."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlive_jax.cli.options import Command
from longlive_jax.spec import UserError

if TYPE_CHECKING:
    from longlive_jax.adapters import Adapter
    from longlive_jax.sampling.pipeline import Pipeline


def read_adapters(
    given: Sequence[str] | None, record: Mapping[str, Any] | None
) -> "list[tuple[Adapter, float]]":
    """The adapters of the command line, or else those of a record, with their strengths.

    Raises UserError for one that is missing or damaged.
    """
    from longlive_jax.adapters import load_adapter, parse_strength

    if given is None:
        recorded = () if record is None else record.get("adapters", ())
        return [(load_adapter(path), scale) for path, scale in map(_recorded, recorded)]
    return [(load_adapter(path), scale) for path, scale in map(parse_strength, given)]


def _recorded(entry: Any) -> tuple[str, float]:
    """Path and strength of an adapter in a record."""
    values = entry if isinstance(entry, dict) else {}
    path, scale = values.get("path"), values.get("scale")
    if isinstance(path, str) and isinstance(scale, int | float) and not isinstance(scale, bool):
        return path, float(scale)
    raise UserError(
        f"the record's adapters must have a path and a scale, got {entry!r:.80}; state them with "
        "--adapter=PATH:SCALE"
    )


def stated_settings(command: Command) -> set[str]:
    """The sampling settings that the command line itself states."""
    names = (name.split(".") for name in command.given)
    return {parts[1] for parts in names if parts[0] == "sample" and len(parts) > 1}


def adapted_pipeline(
    folder: Path,
    settings: Mapping[str, Any],
    adapters: "Sequence[tuple[Adapter, float]]",
    chosen: Iterable[str],
) -> "Pipeline":
    """The pipeline of a checkpoint with adapters plugged in; prints one line for each.

    Args:
      folder: checkpoint directory.
      settings: sampling settings.
      adapters: adapters and their strengths.
      chosen: names of settings that adapters do not change.
    """
    from longlive_jax.sampling.pipeline import Pipeline

    pipe = Pipeline(Pipeline.from_checkpoint(folder, **settings).engine, chosen=chosen)
    if not adapters:
        return pipe
    pipe = pipe.with_adapter([x for x, _ in adapters], [scale for _, scale in adapters])
    for adapter, scale in adapters:
        print(f"adapter: {adapter.describe()}" + (f"; at scale {scale:g}" if scale != 1 else ""))
    return pipe
