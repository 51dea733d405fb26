"""Balanced and naive: the same loss, other shares of the work."""

import json

import jax
import pytest

from longlive_jax.cli.app import run

SMALL = ["--sp=2", "--chunks=4", "--chunk=2", "--size=32", "--dim=24", "--layers=1", "--repeats=1"]


@pytest.fixture(autouse=True)
def devices():
    """Counts them before the command may choose how many there are."""
    assert jax.device_count() == 8


def test_report(capsys):
    assert run(["bench", "balanced", *SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    balanced, naive = found["balanced"], found["naive"]
    assert abs(balanced["loss"] - naive["loss"]) < 1e-5 * balanced["loss"]
    assert balanced["learnt_frames_per_device"] == [4, 4]
    assert naive["learnt_frames_per_device"] == [0, 8]
    assert naive["raw_frames_encoded_per_device"] == 29
    assert balanced["raw_frames_encoded_per_device"] == 16
    assert found["naive_over_balanced"] > 0


def test_bad_sizes(capsys):
    assert run(["bench", "balanced", "--sp=3"]) == 2
    assert "sp is 3 for 8 chunks" in capsys.readouterr().err
    assert run(["bench", "balanced", "--sp=16", "--chunks=16"]) == 2
    assert "there are 8 devices" in capsys.readouterr().err
