"""Generated parts of the documentation: the picture of the packages, and the tables of settings.

Both are made from the code at every build, so that they cannot be out of date. A page asks for a
table with the line `::: settings GROUP` (a group of `longlive settings`).
"""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from draw_architecture import COLOURS, draw  # noqa: E402

from longlive_jax.cli.setting_groups import find_group  # noqa: E402

INTERVAL = re.compile(r"\d+ \(\d+–\d+\)")
MARKER = re.compile(r"^::: settings (.+)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the picture of the packages, for the light and the dark colours."""
    for scheme, colours in COLOURS.items():
        name = f"assets/architecture-{scheme}.svg"
        files.append(File.generated(config, name, content=draw(colours)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces each line `::: settings GROUP` by the table of those settings."""
    return MARKER.sub(lambda match: settings_table(match[1]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Keeps a number and its interval, as in `94 (90–97)`, on one line."""
    return INTERVAL.sub(r'<span class="interval">\g<0></span>', html)


def settings_table(name: str) -> str:
    """The table of a group's settings; that of a training stage leaves out what all stages have."""
    common = {row.path for row in find_group("train").rows} if name.startswith("train ") else set()
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for row in find_group(name).rows:
        if row.path in common:
            continue
        choices = " or ".join(f"`{word}`" for word in row.type.split(" | "))
        kind = "group" if row.is_group else choices
        default = f"`{row.default}`" if row.default else ""
        cells = (f"`{row.path}`", kind, default, row.meaning)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)
