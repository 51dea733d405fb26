"""Settings read off dataclasses: every field has a meaning, nested ones and defaults included."""

import dataclasses
from typing import Any, Literal

import pytest

from longlive_jax.cli import setting_groups
from longlive_jax.cli.setting_rows import (
    SettingRow,
    describe,
    marked,
    settings_table,
    type_name,
    value_text,
)


@dataclasses.dataclass(frozen=True)
class Inner:
    """Something within.

    Attributes:
      depth: how deep, in
        metres.
    """

    depth: float = 2.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """What all have.

    Attributes:
      seed: seed of everything.
    """

    seed: int = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Base):
    """Something.

    Attributes:
      name: what it is called: a word.
      inner: what is within.
      other: likewise, or None.
      items: several of them.

    Raises ValueError never.
    """

    name: Literal["a", "b"] = "a"
    inner: Inner = Inner(depth=3.0)
    other: Inner | None = None
    items: tuple[Inner, ...]


def test_rows_of_a_nested_dataclass():
    assert describe(Outer, prefix="x.") == [
        SettingRow("x.seed", "int", "7", "seed of everything."),
        SettingRow("x.name", "a | b", "a", "what it is called: a word."),
        SettingRow("x.inner", "group", "", "what is within."),
        SettingRow("x.inner.depth", "float", "3.0", "how deep, in metres."),
        SettingRow("x.other", "group", "none", "likewise, or None."),
        SettingRow("x.other.depth", "float", "2.5", "how deep, in metres."),
        SettingRow("x.items", "list of Inner", "required", "several of them."),
        SettingRow("x.items[].depth", "float", "2.5", "how deep, in metres."),
    ]


def test_values_replace_defaults():
    rows = describe(Outer, values=Outer(seed=1, other=Inner(9.0), items=(Inner(), Inner())))
    values = {row.path: row.default for row in rows}
    assert values["seed"] == "1" and values["other.depth"] == "9.0" and values["items"] == "2 items"


@pytest.mark.parametrize("name", setting_groups.group_names())
def test_every_setting_has_a_meaning(name):
    """Also those of nested and of base classes: their docstrings have one line per field."""
    rows = setting_groups.find_group(name).rows
    assert len(rows) > 20
    assert not [row.path for row in rows if not row.meaning.strip()]


def test_every_settings_class_is_in_a_group():
    """The groups reach what a recipe can set: a setting of each level, by its documented name."""
    paths = {f"{g.name} {row.path}" for g in setting_groups.all_groups() for row in g.rows}
    for path in (
        "sample sample.quant.policy",
        "evaluate evaluate.long.chunks",
        "train loop.steps",
        "train vae phases[].frames",
        "train text model.vocab_size",
        "train ar recycling.buffer.slots",
        "train clips mesh.sp",
    ):
        assert path in paths


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int | None, "int or none"),
        (tuple[int, int], "(int, int)"),
        (tuple[str, ...], "list of str"),
        (dict[str, Any], "mapping"),
        (Literal["auto", "x"], "auto | x"),
    ],
)
def test_type_names(hint, text):
    assert type_name(hint) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (True, "true"),
        ("", '""'),
        ("cut ", '"cut "'),
        ((704, 1280), "(704, 1280)"),
        ((1,), "(1,)"),
        ((0.0,) * 48, "48 values"),
        ({"steps": 32}, "steps=32"),
        (1e-5, "1e-05"),
    ],
)
def test_value_texts(value, text):
    assert value_text(value) == text


def test_marks():
    rows = [SettingRow(path, "int", "1", "m") for path in ("a.b", "a.c", "ab", "d[].e", "f")]
    names = [row.path for row in marked(rows, ["a.b", "d", "f.g"], "*") if row.mark == "*"]
    assert names == ["a.b", "d[].e", "f"]


def test_table_fits_its_width():
    rows = setting_groups.find_group("train ar").rows
    lines = settings_table(rows, width=100).splitlines()
    assert max(map(len, lines)) <= 100
    assert not [line for line in lines if line != line.rstrip()]
    assert sum(line.startswith("recycling.buffer.slots") for line in lines) == 1
