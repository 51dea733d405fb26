"""Eight CPU devices, exact float32 matmuls, and the paths of the reference's numbers and files.

Compiling takes most of the tests' time, so XLA leaves code as it is written, which halves that.
With JAX_DISABLE_MOST_OPTIMIZATIONS=0, as in `launch/test.sh --slow`, it compiles as for users.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

FLAG = "--xla_force_host_platform_device_count"
if FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}=8".strip()

# Commands that tests start in other processes do not touch the user's cache of compiled programs.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import jax  # noqa: E402  (XLA reads its flags once, at import)
import pytest  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]

jax.config.update("jax_default_matmul_precision", "highest")
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)


SHARED = Path(os.environ.get("LONGLIVE_SHARED", REPOSITORY.parent / "shared"))
"""Reference material that is too large for the repository."""


@dataclasses.dataclass(frozen=True)
class Goldens:
    """Finds golden files by name; a test whose file is missing is skipped.

    Attributes:
      folders: folders to search, in this order.
    """

    folders: Sequence[Path]

    def __truediv__(self, name: str) -> Path:
        for folder in self.folders:
            if (folder / name).is_file():
                return folder / name
        where = " or ".join(map(str, self.folders))
        return pytest.skip(f"no {name} in {where}; set LONGLIVE_SHARED to the folder with goldens/")

    def paths(self) -> list[Path]:
        """All golden files that exist, each from the first folder that has it."""
        names = {path.name for folder in self.folders for path in folder.glob("*.npz")}
        return [self / name for name in sorted({*names, "facts.json"})]


@pytest.fixture(scope="session")
def goldens() -> Goldens:
    """Files of the reference's numbers: `goldens / "rht.npz"`."""
    if importlib.util.find_spec("_lzma") is None:
        pytest.fail("tests/goldens needs a Python with the lzma module")
    return Goldens((REPOSITORY / "tests" / "goldens", SHARED / "goldens"))


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Folder of checkpoint files written by other libraries, some of them hostile."""
    folder = SHARED / "fixtures"
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set LONGLIVE_SHARED to the folder with fixtures/")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the working tree."""
    return REPOSITORY


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "training" not in item.path.parts)  # the longest first
    if any(item.get_closest_marker("gpu") for item in items) and jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
