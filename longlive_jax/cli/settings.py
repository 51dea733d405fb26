"""`longlive settings [VERB | STAGE | RECIPE] [--search=WORD] [--json]`.

Lists settings with their values, types and meanings: those of a verb (`sample`, `evaluate`,
`train`), of a training stage (`vae`, `text`, `ar`, `clips`, `dmd`), or of a recipe (`ar_5b:64s`),
whose own values are marked. Without a name it lists the groups and the recipes; with --search alone
it searches all of them. Other verbs have options only, which are listed instead.
"""

import dataclasses
import json
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from longlive_jax.cli.app import SUBVERBS, VERBS, Parser, help_width, parser_of
from longlive_jax.cli.recipes import known_recipes, recipe_kinds, recipe_summary
from longlive_jax.cli.setting_groups import (
    SettingGroup,
    all_groups,
    find_group,
    group_names,
    is_recipe,
    recipe_group,
)
from longlive_jax.cli.setting_rows import SettingRow, filled, settings_table, value_text
from longlive_jax.spec import UserError, nearest


def main(argv: Sequence[str]) -> int:
    """Prints the settings of a group or recipe, the search's results, or the overview."""
    args = _parser().parse_args(argv)
    name = " ".join(args.name)
    if args.search is not None and not args.search.strip():
        raise UserError("--search: expected a word, got an empty one")
    # 1. The overview.
    if not name and args.search is None:
        print(json.dumps(_overview_values(), indent=1) if args.json else overview())
        return 0
    # 2. Settings.
    groups = [_group(name)] if name else list(all_groups())
    if args.search is not None:
        groups = _matching(groups, args.search)
    if args.json:
        print(json.dumps([_values(group) for group in groups], indent=1))
        return 0
    print("\n\n".join(_text(group) for group in groups))
    return 0


def _parser() -> Parser:
    parser = Parser("settings", __doc__ or "")
    parser.add_argument("name", nargs="*", help="verb, training stage or recipe")
    parser.add_argument("--search", metavar="WORD", help="only settings with this word")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    return parser


def overview() -> str:
    """The groups of settings and the recipes, as text."""
    groups = [(group.name, f"{len(group.rows)}", group.summary) for group in all_groups()]
    recipes = [
        (f"{name}:{argument}".rstrip(":"), kind or "", "" if i else recipe_summary(name))
        for name in known_recipes()
        for i, (argument, kind) in enumerate(recipe_kinds(name).items())
    ]
    return "\n".join(
        [
            "Settings are given as --config.SETTING=VALUE; a recipe (--config=RECIPE) sets some.",
            "`longlive settings NAME` lists those of a group or recipe, --search=WORD finds one.",
            "",
            *_columns(("group", "settings", ""), groups),
            "",
            *_columns(("recipe", "verb", ""), recipes),
            "",
            "A recipe of your own is a file: --config=FOLDER/FILE.py:ARGUMENT.",
        ]
    )


def _columns(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table, whose last column is cut at the width of the help."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head) - 1)]
    lines = []
    for row in (head, *rows):
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
        start = "  ".join(cells) + "  "
        lines.append(start + textwrap.shorten(row[-1], help_width() - len(start), placeholder="…"))
    return [line.rstrip() for line in lines]


def _group(name: str) -> SettingGroup:
    """The settings of a group, recipe or verb; UserError for another name."""
    if is_recipe(name):
        return recipe_group(name)
    if name.split(" ")[0] in VERBS and name not in group_names() and not name.startswith("train"):
        return _options_group(name)
    try:
        return find_group(name)
    except UserError:
        hint = nearest(name, _known_names())
        raise UserError(f"settings: unknown name {name!r}{hint}") from None


def _known_names() -> set[str]:
    """What `longlive settings` accepts, without the arguments of recipes."""
    subverbs = (f"{verb} {sub}" for verb, subs in SUBVERBS.items() for sub in subs)
    return {*group_names(), *(VERBS.keys() - SUBVERBS.keys()), *subverbs, *known_recipes()}


def _options_group(name: str) -> SettingGroup:
    """The options of a verb that takes no recipe."""
    if name in SUBVERBS:
        known = ", ".join(SUBVERBS[name])
        raise UserError(
            f"settings: {name} has verbs of its own: {known}; write `longlive settings {name} VERB`"
        )
    verb, _, subverb = name.partition(" ")
    if subverb and subverb not in SUBVERBS.get(verb, ()):
        raise UserError(f"settings: unknown name {name!r}{nearest(name, _known_names())}")
    parser = parser_of(name.split())
    assert parser is not None
    rows = tuple(
        SettingRow(
            action.option_strings[-1] if action.option_strings else action.dest,
            " | ".join(action.choices) if action.choices else _type_of(action),
            "required" if action.required else value_text(action.default),
            (action.help or "").replace("%%", "%"),
        )
        for action in parser.public_actions()
    )
    takes_config = any(row.path == "--config" for row in rows)
    notes = () if takes_config else (f"These are the options of `longlive {name}`.",)
    summary = VERBS.get(name) or (parser.description or "").partition("\n")[0]
    return SettingGroup(name, summary, rows, notes)


def _type_of(action: Any) -> str:
    """Type of an option in words."""
    if action.nargs == 0:
        return "flag"
    return getattr(action.type, "__name__", "str").strip("_").lower().replace("_", " ")


def _matching(groups: Iterable[SettingGroup], word: str) -> list[SettingGroup]:
    """The groups with only the settings that match `word`, without empty groups.

    A setting that all stages have is listed once. Raises UserError if no setting matches.
    """
    groups, listed, results = list(groups), set(), []
    for group in groups:
        rows = tuple(row for row in group.rows if row.matches(word) and row not in listed)
        listed |= set(rows) if group.name == "train" else set()
        if rows:
            results.append(dataclasses.replace(group, rows=rows, notes=()))
    if not results:
        names = {part for g in groups for row in g.rows for part in row.path.split(".")}
        raise UserError(f"no setting has the word {word!r}{nearest_only(word, names)}")
    return results


def nearest_only(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for a close word, else nothing."""
    hint = nearest(word, known)
    return hint if "did you mean" in hint else ""


def _text(group: SettingGroup) -> str:
    """A group as text: its name, the settings, the notes."""
    title = group.summary if group.summary.startswith(group.name) else f"{group.name}: "
    title = title if title == group.summary else f"{title}{group.summary}"
    width = help_width()
    notes = ["", filled(group.notes, width=width)] if group.notes else []
    table = settings_table(group.rows, width=width)
    return "\n".join([filled([title], width=width), "", table, *notes])


def _values(group: SettingGroup) -> dict[str, Any]:
    """A group as JSON values."""
    return {
        "name": group.name,
        "summary": group.summary,
        "settings": [dataclasses.asdict(row) for row in group.rows],
    }


def _overview_values() -> dict[str, Any]:
    """The overview as JSON values."""
    groups = {group.name: len(group.rows) for group in all_groups()}
    return {"groups": groups, "recipes": {name: recipe_kinds(name) for name in known_recipes()}}
