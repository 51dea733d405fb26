"""Finds the examples of pages and docstrings with Sybil, and runs them.

The blocks of a page run in order, in one folder and one Python namespace; `longlive` commands run
in this process. What a command is given beyond its text, and what is not run, is in `rules`.
"""

import ast
import functools
import json
import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from sybil import Document, Example, Region, Sybil
from sybil.document import PythonDocStringDocument
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from sybil.region import Lexeme

from longlive_jax.cli.app import run
from longlive_jax.sampling.script import read_scripts
from tests.docs import rules

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
SOURCES = sorted(
    path
    for top in ("longlive_jax", "pallas_kernels", "configs")
    for path in (REPOSITORY / top).rglob("*.py")
)
PROGRAMS = ("longlive", "python", "./launch/", "pip ", "sbatch", "kubectl")
"""Beginnings of commands in docstrings."""


# --- Running ---


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def run_command(words: list[str], where: str) -> None:
    """Runs one command, with what `rules` adds; AssertionError if it fails."""
    if ">" in words:  # the output goes to a file; here it is captured
        words = words[: words.index(">")]
    text = " ".join(words)
    for prefix, check in rules.NOT_RUN.values():
        if text.startswith(prefix):
            check(words)
            return
    argv = rules.longlive_arguments(words)
    assert argv is not None, f"{where}: no rule for {text!r}; see tests/docs/rules.py"
    more = rules.smaller(" ".join(argv))
    code = run([*argv, *more])
    assert code == 0, f"{where}: `{text}` with {more} ended with exit code {code}"


def all_commands() -> list[list[str]]:
    """Every command of all pages and docstrings."""
    texts = [str(x.parsed) for path in SOURCES for x in docstring_examples(path)]
    shell = [text for text in texts if kind_of(text) == "sh"]
    return page_commands() + [words for text in shell for words in commands(text)]


def run_shell(example: Example) -> None:
    """Runs each line of a block as a command."""
    for words in commands(str(example.parsed)):
        run_command(words, f"{example.path}:{example.line}")


def read_yaml(example: Example) -> None:
    """Reads a script; a block that begins with a comment of a file name becomes that file."""
    text = str(example.parsed)
    name = re.match(r"# ([\w./-]+\.yaml)\n", text)
    path = Path(name[1] if name else "unnamed.yaml")
    path.write_text(text, encoding="utf-8")
    if "shots" in yaml.safe_load(text):
        assert read_scripts(path)


def read_json(example: Example) -> None:
    """Parses each line as JSON, and reads it if it is a script."""
    for line in str(example.parsed).splitlines():
        if "prompt" in json.loads(line).get("shots", [{}])[0]:
            Path("unnamed.json").write_text(line, encoding="utf-8")
            assert read_scripts("unnamed.json")


run_python = PythonEvaluator()

# --- Pages ---

EVALUATORS = {"sh": run_shell, "python": run_python, "yaml": read_yaml, "json": read_json}
"""Language of a block -> what runs or reads it. Blocks of `text` are file trees and output."""
PAGE_PARSER = Sybil([CodeBlockParser(name, run) for name, run in EVALUATORS.items()])


def page_examples(path: Path) -> list[Example]:
    """The runnable blocks of a page, in order; they share one namespace."""
    return list(PAGE_PARSER.parse(path).examples())


# --- Docstrings ---


def indented_blocks(document: Document) -> Iterable[Region]:
    """Blocks of a docstring that are indented by four spaces after a blank line."""
    lines = document.text.splitlines(keepends=True)
    indents = [len(line) - len(line.lstrip(" ")) if line.strip() else None for line in lines]
    base = min((n for n in indents[1:] if n is not None), default=0)
    starts = [sum(map(len, lines[:i])) for i in range(len(lines) + 1)]
    i = 1
    while i < len(lines):
        above = next((n for n in indents[i - 1 : 0 : -1] if n is not None), base)
        end = i
        if indents[i] is not None and indents[i - 1] is None and above == base:
            while end < len(lines) and (indents[end] is None or indents[end] >= base + 4):
                end += 1
        text = textwrap.dedent("".join(lines[i:end])).strip()
        if text:
            yield Region(starts[i], starts[end], Lexeme(text + "\n", 0, 0), run_docstring_block)
        i = max(i + 1, end)


class DocstringDocument(Document):
    """Docstrings as Sybil reads them, without its import of the module they are in."""

    extract_docstrings = staticmethod(PythonDocStringDocument.extract_docstrings)
    parse = classmethod(PythonDocStringDocument.parse.__func__)


DOCSTRING_PARSER = Sybil([indented_blocks], document_types={".py": DocstringDocument})


def docstring_examples(path: Path) -> list[Example]:
    """The indented blocks of all docstrings of a file."""
    return list(DOCSTRING_PARSER.parse(path).examples())


def kind_of(text: str) -> str:
    """`sh`, `yaml` or `python`, by the first line of a docstring's block."""
    first = text.splitlines()[0]
    if first.startswith(PROGRAMS):
        return "sh"
    return "yaml" if re.match(r"[a-z_]+:( |$)", first) else "python"


def run_docstring_block(example: Example) -> None:
    """Runs a docstring's block as what it is; commands that are on a page run there."""
    text = str(example.parsed)
    if kind_of(text) != "sh":
        EVALUATORS[kind_of(text)](example)
        return
    for words in commands(text):
        if by_recipe_name(words) not in page_commands():
            run_command(words, f"{example.path}:{example.line}")


def by_recipe_name(words: list[str]) -> list[str]:
    """A command with recipes by name instead of by file."""
    return [re.sub(r"^--config=configs/(\w+)\.py", r"--config=\1", word) for word in words]


@functools.cache
def page_commands() -> list[list[str]]:
    """Every command of all pages."""
    examples = [example for page in PAGES for example in page_examples(page)]
    shell = [str(x.parsed) for x in examples if x.region.evaluator is run_shell]
    return [words for text in shell for words in commands(text)]


def called_names(text: str) -> set[str]:
    """Functions and classes that a Python snippet calls by a plain name."""
    tree = ast.parse(text)
    return {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
