"""Tables of settings in Markdown, from the dataclasses and their docstrings."""

import dataclasses
import inspect
import re
import typing
from typing import Any

from longlive_jax.cli.stages import STAGES
from longlive_jax.sampling.settings import SampleSpec
from longlive_jax.small_world.cases import EvaluateSpec
from longlive_jax.training.stages.stage import RunSpec

GROUPS: dict[str, type] = {
    "sample": SampleSpec,
    "evaluate": EvaluateSpec,
    "run": RunSpec,
    **STAGES,
}
"""Words for `::: settings WORD` and their dataclasses."""


def settings_table(group: str) -> str:
    """The table of a group's settings, nested ones by their dotted path.

    A training stage's table leaves out what all stages have, which is group `run`.
    """
    cls = GROUPS[group]
    left_out = {f.name for f in dataclasses.fields(RunSpec)} if group in STAGES else set()
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for path, kind, default, meaning in settings(cls):
        if path.split(".")[0] not in left_out:
            cells = (f"`{path}`", f"`{kind}`", f"`{default}`", meaning)
            rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows)


def settings(cls: type, prefix: str = "", example: Any = None) -> list[tuple[str, str, str, str]]:
    """(path, type, default, meaning) of every field of a dataclass, and of those nested in it.

    Defaults are those of the instance `example`, if there is one.
    """
    hints, meanings = typing.get_type_hints(cls), field_meanings(cls)
    rows = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        default = _default(field) if example is None else getattr(example, field.name)
        hint, path = hints[field.name], prefix + field.name
        kinds = [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]
        if kinds and isinstance(kinds[0], type):
            nested = default if isinstance(default, kinds[0]) else None
            rows += settings(kinds[0], path + ".", nested)
        else:
            shown = "required" if default is dataclasses.MISSING else _literal(default)
            rows.append((path, type_name(hint), shown, meanings.get(field.name, "")))
    return rows


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _literal(value: Any) -> str:
    """A default as it is written on the command line."""
    words = {None: "none", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)


def field_meanings(cls: type) -> dict[str, str]:
    """The `Attributes:` entries of a class and its bases, each on one line."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        _, _, section = text.partition("Attributes:\n")
        section = re.split(r"\n\n?(?=\S)", section)[0]
        for names, meaning in re.findall(
            r"^  (\w[\w, ]*): (.*(?:\n    .*)*)", section, re.MULTILINE
        ):
            for name in names.split(", "):
                meanings[name] = " ".join(meaning.split())
    return meanings


def type_name(hint: Any) -> str:
    """A short form of an annotation: `int`, `float or none`, `"a" or "b"`."""
    hint = getattr(hint, "__value__", hint)
    args = typing.get_args(hint)
    if hint is type(None):
        return "none"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f'"{arg}"' for arg in args)
    if typing.get_origin(hint) is tuple:
        return f"({', '.join('...' if arg is Ellipsis else type_name(arg) for arg in args)})"
    if typing.get_origin(hint) in (typing.Union, type(int | None)):
        return " or ".join(type_name(arg) for arg in args)
    return str(getattr(typing.get_origin(hint) or hint, "__name__", hint))
