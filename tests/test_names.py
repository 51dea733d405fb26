"""Every name is defined somewhere, which lint and types cannot say here.

Both take the axis names of array annotations (`Float[Array, "b l e"]`) for code, so their checks of
undefined names are off. Here ruff's is on, and only what lies within such an axis string is let
pass: a missing import anywhere else fails.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ("longlive_jax", "pallas_kernels", "configs", "tests")
ARRAYS = {"Bool", "Float", "Float32", "Int", "Int32", "Key", "Shaped", "UInt8"}
"""What is subscripted with a kind of array and its axes."""


def axis_strings(tree):
    """(line, first column, last column) of the strings that name axes."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Tuple):
            continue
        if isinstance(node.value, ast.Name) and node.value.id in ARRAYS:
            axes = node.slice.elts[-1]
            if isinstance(axes, ast.Constant) and isinstance(axes.value, str):
                yield axes.lineno, axes.col_offset + 1, axes.end_col_offset + 1


def undefined(*paths):
    """`file:line: message` for every undefined name that is not an axis."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache"]
    rules = ["--select=F821", "--target-version=py312", "--output-format=json"]
    done = subprocess.run([*command, *rules, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    axes, problems = {}, []
    for item in json.loads(done.stdout):
        name, (row, column) = item["filename"], (item["location"][k] for k in ("row", "column"))
        if name not in axes:
            axes[name] = list(axis_strings(ast.parse(Path(name).read_text())))
        if not any(line == row and a <= column < b for line, a, b in axes[name]):
            problems.append(f"{name}:{row}: {item['message']}")
    return problems


def test_every_name_is_defined():
    assert not undefined(*(ROOT / name for name in CODE))


def test_what_is_missing_is_found(tmp_path):
    """In code and in annotations, though an axis has the same name; the axes themselves are not."""
    path = tmp_path / "some.py"
    path.write_text(
        "from jaxtyping import Float\n"
        "from longlive_jax.typing import Array\n"
        'def one(x: Float[Array, "b"], y: Float[Array, "b l"]) -> Float[Array, "*b l"]:\n'
        "    return jnp.sum(x) + b\n"
        'def two(x: "Sample") -> Float[Missing, "b"]: ...\n'
    )
    problems = [line.split(":")[-2:] for line in undefined(path)]
    assert [(int(row), text.split("`")[1]) for row, text in problems] == [
        (4, "jnp"), (4, "b"), (5, "Sample"), (5, "Missing")
    ]  # fmt: skip
