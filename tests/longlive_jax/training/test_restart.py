"""Interrupted runs: resumed = uninterrupted."""

import json
import shutil
import signal
import time
from pathlib import Path

import chex
import jax
import pytest

from longlive_jax.training.checkpointing import TrainCheckpoints
from longlive_jax.training.state import REPLICATED
from tests.longlive_jax.training import toy_run
from tests.longlive_jax.training.processes import ended, start, wait_for, wait_for_words
from tests.longlive_jax.training.toy_task import RATIO, one_device

DEVICES = 4
EARLIER = Path(__file__).with_name("earlier_version")
"""Work directories of runs before train states had groups."""


def final(workdir, step=20, make=lambda mesh: toy_run.make_trainer(mesh, REPLICATED)):
    """The state of the newest checkpoint, on one device."""
    like = make(one_device()).abstract
    with TrainCheckpoints(workdir) as checkpoints:
        restored = checkpoints.restore(like, say=pytest.fail)
    assert restored is not None and restored[0] == step
    return jax.device_get(restored[1])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """An uninterrupted run of 20 steps."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    code, output = ended(start(workdir, 20, 0, devices=DEVICES))
    assert code == 0 and "done at step 20" in output, output
    return workdir


def records(workdir):
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if "loss" in r]


def losses(workdir):
    return [(r["step"], r["loss"]) for r in records(workdir)]


def test_restart_after_a_kill_is_bit_for_bit_the_uninterrupted_run(uninterrupted, tmp_path):
    """Only the steps since the last checkpoint are repeated."""
    first = start(tmp_path, 20, 0.2, devices=DEVICES)
    wait_for(tmp_path / "state/10", first)
    time.sleep(0.3)
    first.send_signal(signal.SIGKILL)
    assert ended(first)[0] == -signal.SIGKILL
    code, output = ended(start(tmp_path, 20, 0, devices=DEVICES))
    assert code == 0 and "Resumed from step 1" in output, output
    chex.assert_trees_all_equal(final(tmp_path), final(uninterrupted))
    assert losses(tmp_path) == losses(uninterrupted)


def test_restart_after_sigterm_resumes_from_the_interrupted_step(uninterrupted, tmp_path):
    first = start(tmp_path, 20, 0.2, devices=DEVICES)
    wait_for(tmp_path / "state/5", first)
    first.send_signal(signal.SIGTERM)
    code, output = ended(first)
    assert code == 128 + signal.SIGTERM and "Rerun the same command to resume" in output, output
    stopped = max(int(p.name) for p in (tmp_path / "state").iterdir())
    code, output = ended(start(tmp_path, 20, 0, devices=DEVICES))
    assert code == 0 and f"Resumed from step {stopped}" in output, output
    chex.assert_trees_all_equal(final(tmp_path), final(uninterrupted))
    assert losses(tmp_path) == losses(uninterrupted)


def test_restart_after_ctrl_c(uninterrupted, tmp_path):
    """The first one checkpoints and ends the run; a second one does not wait for that."""
    first = start(tmp_path, 20, 0.2, devices=DEVICES)
    wait_for(tmp_path / "state/5", first)
    first.send_signal(signal.SIGINT)
    code, output = ended(first)
    assert code == 128 + signal.SIGINT and "Rerun the same command to resume" in output, output
    again = start(tmp_path, 20, 5, devices=DEVICES)  # seconds a batch: the step takes long
    wait_for_words("Resumed", again)
    again.send_signal(signal.SIGINT)
    wait_for_words("Ctrl-C again stops at once", again)
    again.send_signal(signal.SIGINT)
    wait_for_words("KeyboardInterrupt", again)
    assert ended(again)[0] not in (0, 128 + signal.SIGINT)
    code, output = ended(start(tmp_path, 20, 0, devices=DEVICES))
    assert code == 0, output
    chex.assert_trees_all_equal(final(tmp_path), final(uninterrupted))
    assert losses(tmp_path) == losses(uninterrupted)


def test_restart_on_another_mesh_gives_nearly_the_same(uninterrupted, tmp_path):
    first = start(tmp_path, 20, 0.2, devices=DEVICES)
    wait_for(tmp_path / "state/10", first)
    first.kill()
    ended(first)
    code, output = ended(start(tmp_path, 20, 0, devices=1))
    assert code == 0 and "Resumed from step" in output, output
    chex.assert_trees_all_close(final(tmp_path), final(uninterrupted), rtol=1e-5, atol=1e-6)


def test_two_groups_at_a_ratio_are_killed_resumed_and_equal_the_uninterrupted_run(tmp_path):
    """Their states, frozen parameters, counts and the place in the cycle of updates."""
    code, output = ended(start(tmp_path / "uninterrupted", 20, 0, "two_groups", devices=1))
    assert code == 0, output
    killed = start(tmp_path / "killed", 20, 0.2, "two_groups", devices=1)
    wait_for(tmp_path / "killed/state/10", killed)
    time.sleep(0.5)  # a few steps into the cycle
    killed.send_signal(signal.SIGKILL)
    ended(killed)
    code, output = ended(start(tmp_path / "killed", 20, 0, "two_groups", devices=1))
    assert code == 0 and "Resumed from step 1" in output and "frozen" not in output, output
    want, got = (
        final(tmp_path / name, make=toy_run.two_groups_trainer)
        for name in ("uninterrupted", "killed")
    )
    chex.assert_trees_all_equal(got, want)
    assert int(got.loss_state) == 20 + 20 // RATIO
    steps = [
        r["step"]
        for r in map(json.loads, (tmp_path / "killed/metrics.jsonl").read_text().splitlines())
        if "generator_loss" in r
    ]
    assert steps == [1, 6, 11, 16]


def test_a_checkpoint_of_an_earlier_version_is_resumed(uninterrupted, tmp_path):
    """The first 10 of these 20 steps, by the version that had one group of parameters."""
    shutil.copytree(EARLIER / "toy", tmp_path, dirs_exist_ok=True)
    code, output = ended(start(tmp_path, 20, 0, devices=1))
    assert code == 0 and "Resumed from step 10" in output, output
    chex.assert_trees_all_close(final(tmp_path), final(uninterrupted), rtol=1e-5, atol=1e-6)
