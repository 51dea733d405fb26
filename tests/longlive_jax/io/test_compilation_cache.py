"""A Python program keeps its compiled programs after one call."""

import os
import subprocess
import sys

PROGRAM = """
import jax
from longlive_jax import enable_compilation_cache
print(enable_compilation_cache())
jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((64, 64))).block_until_ready()
"""


def test_a_program_keeps_what_it_compiles(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "true"
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.startswith(str(tmp_path / "longlive-jax"))
    assert list(tmp_path.rglob("*-cache"))
