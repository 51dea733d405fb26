"""Reads settings off their dataclasses: name, type, default, and meaning from the docstring.

`describe(SampleSpec)` returns one `SettingRow` per setting, nested ones included; `settings_table`
prints rows as text.
"""

import dataclasses
import inspect
import io
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

REQUIRED = "required"
"""Default of a setting that has none."""

GROUP = "group"
"""Type of a row that stands for a nested dataclass, whose settings follow it."""

MAX_TEXT = 30
"""Characters of a value in a table; longer ones are cut."""


@dataclasses.dataclass(frozen=True)
class SettingRow:
    """One setting.

    Attributes:
      path: dotted name, such as `loop.steps`; `phases[].steps` for items of a list.
      type: type in words, or the choices of a `Literal`; `group` for a nested dataclass.
      default: default as text, or "required".
      meaning: one line from the docstring of its class; empty if that has none.
      mark: what set the value, one character; empty for a default.
    """

    path: str
    type: str
    default: str
    meaning: str
    mark: str = ""

    @property
    def is_group(self) -> bool:
        """Whether it is a nested dataclass, whose settings have rows of their own."""
        return self.type == GROUP

    def matches(self, word: str) -> bool:
        """Whether `word` is in the path, type or meaning, in any case."""
        return word.casefold() in f"{self.path} {self.type} {self.meaning}".casefold()


def describe(cls: type, *, prefix: str = "", values: Any = None) -> list[SettingRow]:
    """The settings of a dataclass, in the order of its fields, nested ones after their group.

    Args:
      cls: the dataclass.
      prefix: text before every path, such as `sample.`.
      values: an instance of `cls` whose values replace the defaults.
    """
    hints, meanings = typing.get_type_hints(cls), field_meanings(cls)
    rows: list[SettingRow] = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        path, hint = f"{prefix}{field.name}", hints[field.name]
        value = _default(field) if values is None else getattr(values, field.name)
        nested = _nested(hint)
        meaning = meanings.get(field.name, "")
        if nested is None:
            rows.append(SettingRow(path, type_name(hint), value_text(value), meaning))
        elif typing.get_origin(hint) in (tuple, list):
            items = "" if value in (dataclasses.MISSING, ()) else f"{len(value)} items"
            kind = f"list of {nested.__name__}"
            rows.append(SettingRow(path, kind, items or value_text(value), meaning))
            rows += describe(nested, prefix=f"{path}[].")
        else:
            is_set = isinstance(value, nested)
            default = "" if is_set else value_text(value)
            rows.append(SettingRow(path, GROUP, default, meaning))
            rows += describe(nested, prefix=f"{path}.", values=value if is_set else None)
    return rows


def field_meanings(cls: type) -> dict[str, str]:
    """Field name -> meaning, from the "Attributes:" of the class and of its base classes."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        meanings |= _attributes(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
    return meanings


def _attributes(docstring: str) -> dict[str, str]:
    """The entries of a docstring's "Attributes:" section, each joined to one line."""
    entries: dict[str, str] = {}
    _, _, section = docstring.partition("Attributes:\n")
    name = ""
    for line in section.splitlines():
        entry = re.match(r"  (\w+): (.*)", line)
        if entry is not None:
            name = entry[1]
            entries[name] = entry[2]
        elif name and line.startswith("    "):
            entries[name] += f" {line.strip()}"
        elif line.strip():
            break  # the end of the section
    return entries


def _default(field: dataclasses.Field) -> Any:
    """A field's default value, or `dataclasses.MISSING`."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _nested(hint: Any) -> type | None:
    """The dataclass in an annotation: the annotation itself, an optional one, or a list's items."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple, list):
        options = (_nested(arg) for arg in typing.get_args(hint))
        return next((option for option in options if option is not None), None)
    return None


def type_name(hint: Any) -> str:
    """An annotation in words: `int`, `a | b` for choices, `list of int`, `int or none`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        if any("dtype" in str(arg).lower() for arg in args):
            return "dtype"
        kinds = [type_name(arg) for arg in args if arg is not types.NoneType]
        return " or ".join([*kinds, *(["none"] if types.NoneType in args else [])])
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        return f"list of {type_name(args[0])}"
    if origin is tuple:
        return f"({', '.join(map(type_name, args))})"
    if origin is not None and issubclass(origin, Mapping):
        return "mapping"
    return getattr(hint, "__name__", str(hint))


def value_text(value: Any) -> str:
    """A value as one would write it after `--config.NAME=`, cut if it is long."""
    if value is dataclasses.MISSING:
        return REQUIRED
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, str) and (not value or value != value.strip()):
        return f'"{value}"'
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={value_text(x)}" for key, x in value.items()) or "{}"
    if isinstance(value, tuple | list):
        if len(value) > 4:
            return f"{len(value)} values"
        items = ", ".join(map(value_text, value))
        return f"({items},)" if len(value) == 1 else f"({items})"
    return str(value)


def settings_table(rows: Iterable[SettingRow], *, width: int = 100) -> str:
    """Rows as text in columns: setting, value, meaning; groups have a line of their own."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # 1. Fill the table.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("setting", overflow="fold")
    table.add_column("value", overflow="fold", max_width=20)
    table.add_column("meaning", ratio=1)
    for row in rows:
        value = row.default if len(row.default) <= MAX_TEXT else f"{row.default[:MAX_TEXT]}…"
        kind = row.type if row.type.startswith("(") else f"({row.type})"
        kind = "" if row.is_group else f"{kind} "
        cells = (row.path, f"{value}{row.mark and ' ' + row.mark}", f"{kind}{row.meaning}")
        table.add_row(*map(Text, cells))
    # 2. Print it without colours, and without spaces at the ends of lines.
    text = io.StringIO()
    Console(file=text, width=width, color_system=None, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def filled(lines: Iterable[str], *, width: int = 100) -> str:
    """Lines of prose, each filled to the width of a table."""
    return "\n".join(textwrap.fill(line, width) for line in lines)


def marked(rows: Sequence[SettingRow], paths: Iterable[str], mark: str) -> list[SettingRow]:
    """`rows` with `mark` at the settings that `paths` name: themselves, a group or a part."""
    names = list(paths)

    def is_set(path: str) -> bool:
        plain = path.replace("[]", "")
        return any(
            f"{plain}.".startswith(f"{name}.") or f"{name}.".startswith(f"{plain}.")
            for name in names
        )

    return [
        dataclasses.replace(row, mark=mark) if not row.is_group and is_set(row.path) else row
        for row in rows
    ]
