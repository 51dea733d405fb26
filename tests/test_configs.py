"""Every config builds its dataclass, with each of its arguments."""

import ast

import pytest

from longlive_jax.cli import app
from longlive_jax.spec import build


def cases() -> list[str]:
    """`configs/x.py:ARG` for no argument and for each of ARGUMENTS, read without importing."""
    names = []
    for name in app.known_configs():
        module = ast.parse((app.REPOSITORY / name).read_text())
        arguments = [
            ast.literal_eval(node.value)
            for node in module.body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ARGUMENTS"
        ]
        assert len(arguments) == 1, f"{name}: list its legal arguments in ARGUMENTS = (...)"
        names += [f"{name}:{argument}" for argument in ("", *arguments[0])]
    return names


@pytest.mark.parametrize("where", cases())
def test_config_builds(where):
    settings = app.load_config(where).to_dict()
    if "stage" in settings:
        from longlive_jax.cli.stages import STAGES

        cls = STAGES[settings.pop("stage")]
    elif "evaluate" in settings:
        from longlive_jax.small_world.cases import EvaluateSpec as cls

        settings = settings["evaluate"]
    else:
        from longlive_jax.sampling.settings import SampleSpec as cls

        settings = settings["sample"]
    assert build(cls, settings, path=where)


@pytest.mark.parametrize("name", app.known_configs())
def test_config_docstring_has_its_command(name):
    docstring = ast.get_docstring(ast.parse((app.REPOSITORY / name).read_text())) or ""
    assert f"--config={name}" in docstring, f"{name}: add the command line to the docstring"
