"""Balanced and contiguous SP have the same loss and divide the work differently."""

import json

import jax
import pytest

from longlive_jax.cli.app import run

SMALL = ["--sp=2", "--chunks=4", "--chunk=2", "--size=32", "--dim=24", "--layers=1", "--repeats=1"]


@pytest.fixture(autouse=True)
def devices():
    """Initializes JAX's 8 simulated devices before the command can ask for another number."""
    assert jax.device_count() == 8


def test_report(capsys):
    assert run(["bench", "balanced", *SMALL, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"machine", "spec", "balanced", "naive", "naive_over_balanced"}
    assert report["spec"]["chunk"] == 2
    balanced, contiguous = report["balanced"], report["naive"]
    assert abs(balanced["loss"] - contiguous["loss"]) < 1e-5 * balanced["loss"]
    assert balanced["learnt_frames_per_device"] == [4, 4]
    assert contiguous["learnt_frames_per_device"] == [0, 8]
    assert contiguous["raw_frames_encoded_per_device"] == 29
    assert balanced["raw_frames_encoded_per_device"] == 16
    assert report["naive_over_balanced"] > 0


def test_invalid_sizes_are_rejected(capsys):
    assert run(["bench", "balanced", "--sp=3"]) == 2
    assert "sp must be >= 2 and a divisor of chunks = 8, got 3" in capsys.readouterr().err
    assert run(["bench", "balanced", "--sp=16", "--chunks=16"]) == 2
    assert "--sp must be <= 8, the number of devices, got 16" in capsys.readouterr().err
