"""`longlive env`: what it prints, and that no probe can make it fail."""

import json
import platform
from importlib.metadata import version

import pytest

from longlive_jax.cli import env
from longlive_jax.cli.app import run


def report(capsys):
    assert run(["env", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_report(capsys, monkeypatch, tmp_path):
    (tmp_path / "program").write_bytes(b"x" * 2_500_000)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("LONGLIVE_SOMETHING", "1")
    monkeypatch.setenv("JAX_API_TOKEN", "abc")
    values = report(capsys)
    assert platform.python_version() in values["Python"]
    assert values["packages"]["jax"] == version("jax")
    assert values["packages"]["orbax-checkpoint"] == version("orbax-checkpoint")
    assert values["devices"][0].startswith("cpu: ")
    assert values["compilation cache"] == f"{tmp_path}, 1 files, 2.5 MB"
    assert "LONGLIVE_SOMETHING=1" in values["environment"]
    assert "abc" not in json.dumps(values)


def test_lines_are_aligned(capsys):
    assert run(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines[0].index("  ", len("longlive-jax")) and len("compilation cache  ")
    assert all(line[start - 2 : start] == "  " and line[start] != " " for line in lines)


@pytest.mark.parametrize("error", [RuntimeError("no\ndriver"), OSError(), SystemExit(3)])
def test_a_failing_probe_says_why(error, capsys, monkeypatch):
    def fails():
        raise error

    monkeypatch.setattr(env, "PROBES", dict.fromkeys(env.PROBES, fails))
    values = report(capsys)
    assert set(values) == set(env.PROBES)
    reason = " ".join(str(error).split()) or type(error).__name__
    assert set(values.values()) == {f"unavailable: {reason}"}


def test_driver(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert env.run_probe(env.gpu_driver) == "unavailable: nvidia-smi is not on the PATH"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 570.1, 143771 MiB'\n")
    program.chmod(0o755)
    assert env.run_probe(env.gpu_driver) == ["NVIDIA H200, 570.1, 143771 MiB"]
    program.write_text("#!/bin/sh\necho 'driver mismatch'; exit 18\n")
    assert env.run_probe(env.gpu_driver) == "unavailable: driver mismatch"


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(env, "PACKAGES", ("numpy", "no-such-package"))
    assert env.versions() == {
        "numpy": version("numpy"),
        "no-such-package": "unavailable: not installed",
    }
