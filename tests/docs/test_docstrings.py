"""The examples of docstrings run, or are listed here as the tables and formulas that they are."""

import importlib
import shutil
import types

import numpy as np
import pytest

from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.script import ShotScript
from tests.docs.blocks import REPOSITORY, SOURCES, called_names, docstring_examples, kind_of

ASSETS = REPOSITORY / "longlive_jax/assets/small_world"

ILLUSTRATIONS = {
    "longlive_jax/bench/convert_memory.py": "usage with options in brackets",
    "longlive_jax/cli/compilation_cache.py": "usage with names in capitals",
    "longlive_jax/data/clips/flat.py": "files of a dataset",
    "longlive_jax/sampling/record.py": "files of a video, and entries of its record",
    "longlive_jax/data/clips/dataset.py": "files of a dataset, and a line of its manifest",
    "longlive_jax/data/clips/store.py": "files of a store",
    "longlive_jax/diffusion/solvers.py": "formulas",
    "longlive_jax/interop/keytable.py": "calls with most of their arguments left out",
    "longlive_jax/interop/released.py": "entries of a file",
    "longlive_jax/io/checkpoint.py": "files of a checkpoint",
    "longlive_jax/io/packed_kernels.py": "arrays of a packed kernel",
    "longlive_jax/models/wan/packed_cache.py": "formulas",
    "longlive_jax/quant/low_rank.py": "a formula",
    "longlive_jax/quant/packed_product.py": "formulas",
    "longlive_jax/quant/recipe.py": "formulas",
    "longlive_jax/training/checkpointing.py": "files of a work directory",
    "longlive_jax/training/objectives/teacher_forcing.py": "a chain of calls",
    "longlive_jax/training/objectives/dmd/losses.py": "a chain of calls",
}
"""Files whose blocks are not code, and what they are."""

SKETCHES = {
    "longlive_jax/data/clips/__init__.py",
    "longlive_jax/data/clips/loader.py",
    "longlive_jax/models/params.py",
    "longlive_jax/quant/frozen.py",
    "longlive_jax/quant/lora.py",
    "longlive_jax/quant/training.py",
    "longlive_jax/sampling/engine.py",
    "longlive_jax/training/objectives/error_recycling.py",
}
"""Files whose snippets show how internal calls follow each other and leave out their arguments.

They must parse, and every function they call must exist.
"""


class FewSteps(Pipeline):
    """A pipeline whose checkpoints are sampled with one model call per chunk."""

    @classmethod
    def from_checkpoint(cls, *folder, **settings):
        return super().from_checkpoint(*folder, **{"steps": 1} | settings)


def context(path):
    """Names that a file's snippets use: those of their module, and some that they do not make."""
    if path.startswith("configs/"):
        return {}
    return dict(vars(module_of(path))) | _more_names(path)


def module_of(path):
    """The module of a file of the package."""
    return importlib.import_module(
        path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    )


def _more_names(path):
    if path == "longlive_jax/sampling/stream.py":
        pipe = FewSteps.from_checkpoint(ASSETS)
        script = ShotScript.of("a red circle moves left on a mint background", seconds=2)
        return {"stream": pipe.stream(script), "show": lambda frames: None, "bored": True}
    if path == "longlive_jax/cli/interruption.py":
        recorder = types.SimpleNamespace(append=[].append, close=lambda: None)
        return {"load": lambda: None, "stream": iter("ab"), "recorder": recorder}
    names = {"Pipeline": FewSteps, "ShotScript": ShotScript}
    if path.startswith("longlive_jax/io/"):
        names["frames"] = np.zeros((5, 32, 32, 3), np.uint8)
        names["pipe"] = FewSteps.from_checkpoint(ASSETS)
    return names


def files_with_examples():
    return [path for path in SOURCES if docstring_examples(path)]


@pytest.mark.parametrize(
    "path", files_with_examples(), ids=lambda path: str(path.relative_to(REPOSITORY))
)
def test_examples_of_docstrings_run(path, reader, monkeypatch):
    name = str(path.relative_to(REPOSITORY))
    if name in ILLUSTRATIONS:
        assert docstring_examples(path)
        return
    monkeypatch.chdir(reader)
    if name == "configs/small_world.py":  # evaluates what its first command trains in hours
        shutil.copytree(ASSETS, reader / "runs" / "small_world")
    for example in docstring_examples(path):
        if name in SKETCHES and kind_of(str(example.parsed)) == "python":
            _check_names(name, str(example.parsed))
            continue
        example.namespace.update(context(name))
        example.evaluate()


def _check_names(name, text):
    """Every function that the snippet calls belongs to its module, its package, or a subpackage."""
    module = module_of(name)
    missing = {f for f in called_names(text) if not hasattr(module, f)}
    source = "\n".join(
        path.read_text() for path in (REPOSITORY / "longlive_jax").rglob("*.py") if missing
    )
    missing = {f for f in missing if f"def {f}(" not in source and f"class {f}" not in source}
    assert not missing - {"model_loss", "lambda"}, f"{name}: {missing}"


def test_lists_name_files_that_have_examples():
    names = {str(path.relative_to(REPOSITORY)) for path in files_with_examples()}
    assert {*ILLUSTRATIONS, *SKETCHES} <= names
