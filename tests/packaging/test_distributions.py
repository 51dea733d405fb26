"""The wheel and the source distribution contain every file that they should."""

import tarfile
import zipfile
from pathlib import Path

PACKAGES = {"longlive_jax": "longlive_jax", "pallas_kernels": "pallas_kernels",
            "configs": "longlive_jax/configs"}  # fmt: skip
"""Folders of the repository, and where the wheel has their files."""


def files(folder: Path) -> dict[str, Path]:
    """All files below a folder, by their path in it."""
    return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_wheel_has_every_file_of_the_packages(source, distributions):
    expected = {
        f"{target}/{name}": path.read_bytes()
        for folder, target in PACKAGES.items()
        for name, path in files(source / folder).items()
    }
    with zipfile.ZipFile(distributions[1]) as wheel:
        inside = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    assert set(inside) == set(expected)
    assert inside == expected
    assert {f"{package}/py.typed" for package in ("longlive_jax", "pallas_kernels")} <= set(inside)


def test_the_wheel_has_licence_command_and_metadata(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        texts = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist()
                 if ".dist-info/" in name}  # fmt: skip
    assert texts["LICENSE"].strip().startswith("Apache License")
    assert "longlive = longlive_jax.cli.app:run" in texts["entry_points.txt"]
    metadata = texts["METADATA"].partition("\n\n")[0]
    for line in (
        "Requires-Python: >=3.12",
        "Requires-Dist: jax<0.13,>=0.11.2",
        "Project-URL: Paper, https://arxiv.org/abs/2605.18739",
        *(f"Classifier: Programming Language :: Python :: 3.{minor}" for minor in (12, 13)),
        *(f"Provides-Extra: {extra}" for extra in ("dev", "docs", "gpu", "k8s", "plan")),
    ):
        assert line in metadata.splitlines(), line
    assert "Windows" not in metadata


def test_the_source_distribution_has_every_file_of_the_repository(source, tracked, distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = set(files(source) if tracked is None else tracked) - names
    assert not missing, f"add to MANIFEST.in: {sorted(missing)}"
