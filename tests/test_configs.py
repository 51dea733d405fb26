"""Every config builds its dataclass, with each of its arguments."""

import ast

import pytest

from longlive_jax.cli import recipes
from longlive_jax.sampling.kinds import settings_of
from longlive_jax.sampling.settings import SampleSpec
from longlive_jax.spec import build


def cases() -> list[str]:
    """`NAME:ARG` for no argument and for each of ARGUMENTS, read without importing."""
    names = []
    for name in recipes.known_recipes():
        path = recipes.recipe_folder() / f"{name}.py"
        assert "\nARGUMENTS = (" in path.read_text(), f"{name}: list its legal arguments"
        names += [f"{name}:{argument}" for argument in ("", *recipes.recipe_arguments(path))]
    return names


@pytest.mark.parametrize("where", cases())
def test_config_builds(where):
    settings = recipes.load_config(where).to_dict()
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


@pytest.mark.parametrize("name", recipes.known_recipes())
def test_config_docstring_has_its_command(name):
    path = recipes.recipe_folder() / f"{name}.py"
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    commands = (f"--config={name}", f"--config=configs/{name}.py")
    assert any(command in docstring for command in commands), f"{name}: add its command line"


@pytest.mark.parametrize("kind", ["distilled", "two_step", "ar"])
def test_sample_5b_has_the_settings_that_convert_stores(kind):
    settings = recipes.load_config(f"sample_5b:{kind}").to_dict()["sample"]
    assert build(SampleSpec, settings) == build(SampleSpec, settings_of(kind))
