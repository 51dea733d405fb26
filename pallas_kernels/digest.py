"""A digest of a kernel's source, so that a proof ends when the kernel changes."""

import ast
import functools
import hashlib
from pathlib import Path

import jax

ROOT = Path(__file__).parent
INDIFFERENT = ("catalog", "digest", "dispatch", "kernel", "tuned", "attention.mosaic.targets")
"""Modules that do not change what a kernel computes or how: they only select it. A proof names the
tile sizes itself."""


@functools.cache
def source_digest(modules: tuple[str, ...]) -> str:
    """SHA-256 of the source of `modules`, of what they import of this package, and JAX's version.

    Names are relative to the package: "nvfp4.mosaic.quantize".
    """
    reached: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in reached and name not in INDIFFERENT:
            reached.add(name)
            waiting += _imports(name)
    total = hashlib.sha256(jax.__version__.encode())
    for name in sorted(reached):
        total.update(name.encode() + b"\0" + _path(name).read_bytes())
    return total.hexdigest()[:16]


def _path(name: str) -> Path:
    """The file of a module; that of a package is its `__init__`."""
    path = ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imports(name: str) -> list[str]:
    """Modules of this package that a module imports; of a package only those that it names."""
    names = []
    for node in ast.walk(ast.parse(_path(name).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pallas_kernels"):
            base = (node.module or "").removeprefix("pallas_kernels").lstrip(".")
            inner = (f"{base}.{alias.name}".lstrip(".") for alias in node.names)
            modules = [x for x in inner if _path(x).is_file()]
            is_module = base and not (ROOT.joinpath(*base.split(".")) / "__init__.py").is_file()
            names += [base] if is_module else modules
    return names
