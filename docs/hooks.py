"""Generated parts of the documentation: the picture of the packages, and the tables of settings.

Both are made from the code at every build, so that they cannot be out of date. A page asks for the
settings of a recipe with the line `::: settings sample`, where the word is one of `GROUPS`.
"""

import re
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from draw_architecture import COLOURS, draw  # noqa: E402
from mkdocs.config.defaults import MkDocsConfig  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402
from settings_tables import settings_table  # noqa: E402

MARKER = re.compile(r"^::: settings (\w+)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the picture of the packages, for the light and the dark colours."""
    for scheme, colours in COLOURS.items():
        name = f"assets/architecture-{scheme}.svg"
        files.append(File.generated(config, name, content=draw(colours)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces each line `::: settings NAME` by the table of those settings."""
    return MARKER.sub(lambda match: settings_table(match[1]), markdown)
