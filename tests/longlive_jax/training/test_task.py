"""The seams of training: a small `Task`, and a loop that knows nothing about losses."""

import ast
import dataclasses
import inspect

import pytest

from longlive_jax.training import loop
from longlive_jax.training.task import Task
from tests.longlive_jax.training.toy_task import Batches, two_groups_task


def imported_modules(module):
    """Absolute dotted names that a module imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_a_task_has_at_most_eight_fields():
    assert len(dataclasses.fields(Task)) <= 8


def test_a_name_cannot_be_both_frozen_and_trained():
    """Losses get the frozen parameters and the other groups in one mapping."""
    with pytest.raises(ValueError, match=r"\['critic'\] are both frozen and trained"):
        two_groups_task(Batches(1), frozen={"critic": {}})


def test_the_loop_imports_no_objective():
    names = imported_modules(loop)
    assert "longlive_jax.training.task.Task" in names  # the imports are found at all
    assert not [name for name in names if name.startswith("longlive_jax.training.objectives")]
