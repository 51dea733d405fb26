"""Runs that are interrupted and resumed equal uninterrupted runs."""

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
from tests.longlive_jax.training.processes import finish, start, wait_for, wait_for_output
from tests.longlive_jax.training.toy_task import RATIO, one_device, two_groups

DEVICES = 4
EARLIER = Path(__file__).with_name("earlier_version")
"""Work directories of runs by versions whose train state had no groups."""


def restored_state(workdir, step=20, make=lambda mesh: toy_run.make_trainer(mesh, REPLICATED)):
    """The state in the newest checkpoint, which must be that of `step`, restored on one device."""
    like = make(one_device()).abstract
    with TrainCheckpoints(workdir) as checkpoints:
        restored = checkpoints.restore(like, notify=pytest.fail)
    assert restored is not None and restored[0] == step
    return jax.device_get(restored[1])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Work directory of an uninterrupted run of 20 steps."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    code, output = finish(start(workdir, 20, 0, devices=DEVICES))
    assert code == 0 and "done at step 20" in output, output
    return workdir


def records(workdir):
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if "loss" in r]


def losses(workdir):
    return [(r["step"], r["loss"]) for r in records(workdir)]


def test_resuming_after_a_kill_equals_the_uninterrupted_run(uninterrupted, tmp_path):
    """Bit for bit; only the steps since the last checkpoint are repeated."""
    killed = start(tmp_path, 20, 0.2, devices=DEVICES)
    wait_for(tmp_path / "state/10", killed)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    assert finish(killed)[0] == -signal.SIGKILL
    code, output = finish(start(tmp_path, 20, 0, devices=DEVICES))
    assert code == 0 and "Resumed from step 1" in output, output
    chex.assert_trees_all_equal(restored_state(tmp_path), restored_state(uninterrupted))
    assert losses(tmp_path) == losses(uninterrupted)


def test_resuming_after_sigterm_starts_from_the_interrupted_step(uninterrupted, tmp_path):
    interrupted = start(tmp_path, 20, 0.2, devices=DEVICES)
    wait_for(tmp_path / "state/5", interrupted)
    interrupted.send_signal(signal.SIGTERM)
    code, output = finish(interrupted)
    assert code == 128 + signal.SIGTERM and "Rerun the same command to resume" in output, output
    stopped = max(int(p.name) for p in (tmp_path / "state").iterdir())
    code, output = finish(start(tmp_path, 20, 0, devices=DEVICES))
    assert code == 0 and f"Resumed from step {stopped}" in output, output
    chex.assert_trees_all_equal(restored_state(tmp_path), restored_state(uninterrupted))
    assert losses(tmp_path) == losses(uninterrupted)


def test_resuming_after_ctrl_c_equals_the_uninterrupted_run(uninterrupted, tmp_path):
    """The first Ctrl-C checkpoints and ends the run; a second one ends it at once."""
    # 1. One Ctrl-C.
    interrupted = start(tmp_path, 20, 0.2, devices=DEVICES)
    wait_for(tmp_path / "state/5", interrupted)
    interrupted.send_signal(signal.SIGINT)
    code, output = finish(interrupted)
    assert code == 128 + signal.SIGINT and "Rerun the same command to resume" in output, output

    # 2. A second Ctrl-C while a slow step runs (5 seconds per batch).
    aborted = start(tmp_path, 20, 5, devices=DEVICES)
    wait_for_output("Resumed", aborted)
    aborted.send_signal(signal.SIGINT)
    wait_for_output("Ctrl-C again stops at once", aborted)
    aborted.send_signal(signal.SIGINT)
    wait_for_output("KeyboardInterrupt", aborted)
    assert finish(aborted)[0] not in (0, 128 + signal.SIGINT)

    # 3. To the end.
    code, output = finish(start(tmp_path, 20, 0, devices=DEVICES))
    assert code == 0, output
    chex.assert_trees_all_equal(restored_state(tmp_path), restored_state(uninterrupted))
    assert losses(tmp_path) == losses(uninterrupted)


def test_resuming_on_another_mesh_is_close_to_the_uninterrupted_run(uninterrupted, tmp_path):
    killed = start(tmp_path, 20, 0.2, devices=DEVICES)
    wait_for(tmp_path / "state/10", killed)
    killed.kill()
    finish(killed)
    code, output = finish(start(tmp_path, 20, 0, devices=1))
    assert code == 0 and "Resumed from step" in output, output
    chex.assert_trees_all_close(
        restored_state(tmp_path), restored_state(uninterrupted), rtol=1e-5, atol=1e-6
    )


def test_two_groups_with_an_update_ratio_resume_as_if_uninterrupted(tmp_path):
    """States, frozen parameters, counters and the position in the cycle of updates.

    Checkpoints are 4 steps apart and cycles 5, so the run resumes within a cycle.
    """
    code, output = finish(start(tmp_path / "uninterrupted", 20, 0, "two_groups", devices=1))
    assert code == 0, output
    killed = start(tmp_path / "killed", 20, 0.2, "two_groups", devices=1)
    wait_for(tmp_path / "killed/state/12", killed)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    finish(killed)
    code, output = finish(start(tmp_path / "killed", 20, 0, "two_groups", devices=1))
    assert code == 0 and "Resumed from step 1" in output and "frozen" not in output, output
    want, got = (
        restored_state(tmp_path / name, make=two_groups) for name in ("uninterrupted", "killed")
    )
    chex.assert_trees_all_equal(got, want)
    assert int(got.loss_state) == 20 + 20 // RATIO
    steps = [
        r["step"]
        for r in map(json.loads, (tmp_path / "killed/metrics.jsonl").read_text().splitlines())
        if "generator_loss" in r
    ]
    assert steps == [1, 6, 11, 16]


def test_a_run_of_an_earlier_version_resumes(uninterrupted, tmp_path):
    """Its first 10 steps were run by a version with a single group of parameters."""
    shutil.copytree(EARLIER / "toy", tmp_path, dirs_exist_ok=True)
    code, output = finish(start(tmp_path, 20, 0, devices=1))
    assert code == 0 and "Resumed from step 10" in output, output
    chex.assert_trees_all_close(
        restored_state(tmp_path), restored_state(uninterrupted), rtol=1e-5, atol=1e-6
    )
