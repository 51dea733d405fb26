"""The distributions, built from a copy of the working tree, and the wheel, installed.

The environment of the installed wheel sees the packages of the test environment, and not the
working tree: `.pth` files of a folder that a `.pth` file names are not read, so an editable
installation has no effect there.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

OUTPUTS = (".venv", "*.egg-info", "__pycache__", ".*_cache", "PKG-INFO", "setup.cfg", "out")
"""What an unpacked source distribution may contain besides the source."""


def git_files(repository: Path, *options: str) -> list[str] | None:
    """The existing files that `git ls-files` lists; None in an unpacked source distribution."""
    if not (repository / ".git").exists():
        return None
    command = ["git", "-C", repository, "ls-files", "-z", *options]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if name and (repository / name).is_file()]


@pytest.fixture(scope="session")
def tracked(repository) -> list[str] | None:
    """The files under version control; None in an unpacked source distribution."""
    return git_files(repository)


@pytest.fixture(scope="session")
def source(repository, tmp_path_factory) -> Path:
    """A copy of the working tree without ignored files, so that no build writes to the tree."""
    folder = tmp_path_factory.mktemp("source") / "longlive-jax"
    names = git_files(repository, "--cached", "--others", "--exclude-standard")
    if names is None:
        return shutil.copytree(repository, folder, ignore=shutil.ignore_patterns(*OUTPUTS))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repository / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def distributions(source, tmp_path_factory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@dataclasses.dataclass(frozen=True)
class Installation:
    """The wheel in an environment of its own, and an empty folder to run it in.

    Attributes:
      environment: folder of the environment.
      folder: working folder of all commands.
      variables: environment variables of all commands.
    """

    environment: Path
    folder: Path
    variables: dict[str, str]

    @property
    def python(self) -> Path:
        return self.environment / "bin" / "python"

    def run(self, *command: str | Path, code: int = 0) -> str:
        """Runs a command in the folder and returns its output. Fails for another exit code."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.variables, capture_output=True, text=True
        )
        assert done.returncode == code, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def longlive(self, *arguments: str | Path, code: int = 0) -> str:
        """Runs `longlive` with these arguments."""
        return self.run(self.environment / "bin" / "longlive", *arguments, code=code)


@pytest.fixture(scope="session")
def installed(distributions, tmp_path_factory) -> Installation:
    """The wheel, installed without its dependencies."""
    # 1. An environment that sees the packages of this one.
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False, symlinks=True)
    (packages,) = environment.glob("lib/python3*/site-packages")
    ours = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (packages / "test_environment.pth").write_text("\n".join(sorted(ours)) + "\n")

    # 2. The wheel. pip is the test environment's.
    dropped = ("XLA_FLAGS", "PYTHONPATH", "LONGLIVE_SHARED", "VIRTUAL_ENV")
    caches = tmp_path_factory.mktemp("caches")
    variables = {key: value for key, value in os.environ.items() if key not in dropped} | {
        "JAX_COMPILATION_CACHE_DIR": str(caches / "jax"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_CACHE_HOME": str(caches),
    }
    installation = Installation(environment, tmp_path_factory.mktemp("empty"), variables)
    options = ("--quiet", "--no-deps", "--no-index", "--ignore-installed")
    installation.run(installation.python, "-m", "pip", "install", *options, distributions[1])
    return installation
