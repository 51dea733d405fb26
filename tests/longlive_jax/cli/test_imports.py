"""Imports without garbage collection, and how the demo starts."""

import gc
import json
import os
import subprocess
import sys

import pytest

from longlive_jax.cli.imports import uncollected_imports


def printed(program: str, **variables: str):
    """What a program prints as JSON, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"} | variables
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def test_nothing_is_collected_while_importing():
    program = """
import gc, json, sys
from longlive_jax.cli.imports import uncollected_imports
with uncollected_imports():
    before = sum(row["collections"] for row in gc.get_stats())
    import numpy
    during = sum(row["collections"] for row in gc.get_stats()) - before
print(json.dumps([during, gc.get_freeze_count() > 10_000, gc.isenabled()]))
"""
    assert printed(program) == [0, True, True]


def test_a_failed_import_leaves_the_collector_on():
    program = """
import gc, json
from longlive_jax.cli.imports import uncollected_imports
before = gc.get_freeze_count()
try:
    with uncollected_imports():
        import a_module_that_does_not_exist
except ImportError:
    print(json.dumps([gc.get_freeze_count() - before, gc.isenabled()]))
"""
    assert printed(program) == [0, True]


def test_no_effect_after_jax_was_imported():
    assert "jax" in sys.modules
    frozen = gc.get_freeze_count()
    with uncollected_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


@pytest.mark.parametrize(("given", "threads"), [({}, "1"), ({"OPENBLAS_NUM_THREADS": "3"}, "3")])
def test_the_demo_limits_blas_before_numpy_is_imported(given, threads):
    program = """
import json, os, sys
from longlive_jax.cli import demo
def run(*_):
    print(json.dumps([os.environ["OPENBLAS_NUM_THREADS"], "numpy" in sys.modules]))
demo._run = run
demo.main([])
"""
    assert printed(program, **given) == [threads, False]
