"""Every command and snippet of the README and of docs/ runs, in the order of its page.

Long ones run with the tiny settings of `rules.SMALLER`; what cannot run here is in `rules.NOT_RUN`.
Snippets in Python sample with two model calls per chunk unless they say otherwise.
"""

import functools
import re

import pytest

from longlive_jax.sampling.pipeline import Pipeline
from tests.docs import rules
from tests.docs.blocks import EVALUATORS, PAGES, all_commands, page_examples

BLOCK = re.compile(r"^[ ]*```(\S*)[^\n]*\n.*?^[ ]*```[ ]*$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page, reader, monkeypatch):
    few = functools.partial(Pipeline.from_checkpoint, steps=2)
    monkeypatch.setattr(Pipeline, "from_checkpoint", staticmethod(few))
    monkeypatch.chdir(reader)
    for example in page_examples(page):
        example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_has_a_language_that_runs(page):
    languages = BLOCK.findall(page.read_text())
    assert not [name for name in languages if name not in (*EVALUATORS, "text")]
    assert len(page_examples(page)) == sum(name in EVALUATORS for name in languages)


def test_rules_are_of_commands_that_exist():
    commands = all_commands()
    lines = [" ".join(words) for words in commands]
    assert len(lines) > 40
    unused = [
        prefix
        for prefix, _ in rules.NOT_RUN.values()
        if not any(line.startswith(prefix) for line in lines)
    ]
    arguments = [" ".join(rules.longlive_arguments(words) or ()) for words in commands]
    unused += [
        pattern
        for pattern in rules.SMALLER
        if not any(re.match(pattern, line) for line in arguments)
    ]
    assert not unused
