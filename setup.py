"""The packages of the distribution; everything else is in pyproject.toml.

The recipes of `configs/` are installed as `longlive_jax/configs`, so that, for example,
`--config=small_world:text` works in every folder. `pyproject.toml` can search for packages or map a
folder, but not both.
"""

from setuptools import find_namespace_packages, setup

RECIPES = "longlive_jax.configs"

setup(
    packages=[*find_namespace_packages(include=["longlive_jax*", "pallas_kernels*"]), RECIPES],
    package_dir={RECIPES: "configs"},
)
