"""Files for other programs (pip, containers, GitHub, pre-commit) name what exists."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

CUDA = ("nvidia-cuda-nvcc",)
"""Dependencies of the GPU extras in whichever version JAX asks for."""


@pytest.fixture(scope="module")
def constraints(repository) -> dict[str, Version]:
    lines = (repository / "constraints.txt").read_text().splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pins}


@pytest.fixture(scope="module")
def project(repository) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


def requirements(project, *extras):
    """The direct dependencies, with those of some extras."""
    lists = [project["dependencies"], *(project["optional-dependencies"][e] for e in extras)]
    return [Requirement(text) for texts in lists for text in texts]


def test_tested_versions_are_in_the_ranges_of_the_dependencies(project, constraints):
    for requirement in requirements(project, "dev", "docs", "plan"):
        name = canonicalize_name(requirement.name)
        if name not in (project["name"], *CUDA):
            assert name in constraints, f"add {name} to constraints.txt"
            assert constraints[name] in requirement.specifier, f"{name}=={constraints[name]}"


def test_constraints_are_versions_of_published_packages(repository):
    for line in (repository / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), line


def test_jax_and_its_plugins_have_one_range(project):
    every = requirements(project, "gpu", "plan")
    ranges = [str(r.specifier) for r in every if r.name == "jax" or r.name.startswith("jax-")]
    assert ranges == ["<0.13,>=0.11.2"] * 4


@pytest.fixture(scope="module")
def instructions(repository) -> list[tuple[str, str]]:
    """Instructions of the container file, each with its arguments."""
    text = (repository / "launch" / "Containerfile").read_text().replace("\\\n", " ")
    lines = [line.partition(" ") for line in text.splitlines() if line and line[0] != "#"]
    return [(name, rest.strip()) for name, _, rest in lines]


def test_the_container_file_copies_what_the_wheel_needs(repository, instructions):
    copied = {x for name, rest in instructions if name == "COPY" for x in rest.split()[:-1]}
    for name in copied:
        assert (repository / name).exists(), name
    assert copied >= {"configs", "longlive_jax", "pallas_kernels", "pyproject.toml", "setup.py"}
    assert copied >= {"constraints.txt", "LICENSE", "MANIFEST.in", "README.md"}
    assert not copied & set((repository / ".dockerignore").read_text().split())


def test_the_container_runs_longlive_as_an_ordinary_user(project, instructions):
    parsed = dict(instructions)
    assert re.fullmatch(r"docker\.io/library/python:3\.12-slim-\w+", parsed["FROM"])
    assert parsed["USER"] == "1000"
    assert json.loads(parsed["ENTRYPOINT"])[0] in project["scripts"]
    install = next(rest for _, rest in instructions if "pip install" in rest)
    assert "-c constraints.txt" in install
    (extras,) = re.findall(r"\.\[(.+?)\]", install)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_the_cluster_job_runs_the_image_of_the_container_file(repository):
    text = (repository / "launch" / "gke.yaml").read_text()
    assert "build -f launch/Containerfile -t IMAGE ." in text
    _, job = yaml.safe_load_all(text)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    recipe = re.search(r"--config=(\w+):", container["args"][0])
    assert recipe and (repository / "configs" / f"{recipe[1]}.py").is_file()
    assert pod["securityContext"]["fsGroup"] == 1000
    assert container["workingDir"] == container["volumeMounts"][0]["mountPath"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted["shared-memory"] == "/dev/shm"
    assert set(mounted) == {volume["name"] for volume in pod["volumes"]}


def test_the_workflow_runs_the_tests_that_the_readme_names(repository, project):
    text = (repository / ".github" / "workflows" / "test.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    commands = [step["run"] for step in jobs["test"]["steps"] if "run" in step]
    readme = (repository / "README.md").read_text()
    (command,) = set(re.findall(r"^ *(\./launch/test\.sh)\b", readme, re.M))
    assert commands[-1] == command
    versions = jobs["test"]["strategy"]["matrix"]["python"]
    supported = [c.split(" :: ")[-1] for c in project["classifiers"] if ":: Python :: 3." in c]
    assert versions == supported == ["3.12", "3.13"]
    assert "-c constraints.txt" in str(jobs["demo"]["steps"])


def test_scripts_in_launch_can_be_executed(repository):
    for path in (repository / "launch").glob("*.sh"):
        first = path.read_text().splitlines()[0]
        assert os.access(path, os.X_OK) == first.startswith("#!"), path.name


def test_the_launcher_says_where_the_program_is_missing(repository, tmp_path):
    (tmp_path / "launch").mkdir()
    copy = shutil.copy(repository / "launch" / "local.sh", tmp_path / "launch")
    done = subprocess.run([copy], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"No {tmp_path}/.venv/bin/longlive; ")


def test_setup_completes_an_environment_without_pip(repository, tmp_path):
    (tmp_path / "launch").mkdir()
    shutil.copy(repository / "launch" / "setup.sh", tmp_path / "launch")
    # The installation that follows fails at once.
    for name, text in {"pyproject.toml": "", "setup.py": "", "constraints.txt": "==\n"}.items():
        (tmp_path / name).write_text(text)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    program = ["bash", "-c", ". launch/setup.sh && setup"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "Creating .venv" not in done.stderr
    assert "==" in done.stderr and "No module named pip" not in done.stderr
    subprocess.run([tmp_path / ".venv/bin/python", "-m", "pip", "--version"], check=True)


def test_the_commit_hook_is_the_tested_ruff(repository, constraints):
    config = yaml.safe_load((repository / ".pre-commit-config.yaml").read_text())
    (hooks,) = config["repos"]
    assert hooks["repo"].endswith("/ruff-pre-commit")
    assert Version(hooks["rev"].removeprefix("v")) == constraints["ruff"]
    assert [hook["id"] for hook in hooks["hooks"]] == ["ruff-check", "ruff-format"]


def test_the_changelog_has_this_version(repository, project):
    titles = re.findall(r"^## \[(.+?)\]", (repository / "CHANGELOG.md").read_text(), re.M)
    assert titles[0] in ("Unreleased", project["version"])


PATH = re.compile(r"`((?:longlive_jax|pallas_kernels|tests|configs|docs|launch|examples)/[\w/.]+)`")


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_guides_name_files_that_exist(repository, name):
    paths = PATH.findall((repository / name).read_text())
    assert not [path for path in paths if not (repository / path).exists()]
    assert paths or name == "CHANGELOG.md"
