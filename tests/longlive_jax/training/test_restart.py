"""Runs that end before their time, and go on as if they had not."""

import json
import signal
import time

import chex
import jax
import pytest
from jax.sharding import PartitionSpec as P

from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.training.checkpointing import Saves
from longlive_jax.training.optim import OptimSpec, make_optimizer
from longlive_jax.training.state import make_state
from tests.longlive_jax.training import toy_run
from tests.longlive_jax.training.processes import ended, start, wait_for, wait_for_words

DEVICES = 4


def final(workdir, step=20):
    """The state saved last, on one device."""
    mesh = make_mesh(MeshSpec(), jax.devices()[:1])
    tx = make_optimizer(OptimSpec(lr=1e-2), 20)
    state, _ = make_state(lambda: toy_run.init(jax.random.key(0)), tx, mesh, ((".*", P()),))
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with Saves(workdir) as saves:
        found = saves.restore(like, say=pytest.fail)
    assert found is not None and found[0] == step
    return jax.device_get(found[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 20 steps that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole")
    code, output = ended(start(workdir, 20, 0, devices=DEVICES))
    assert code == 0 and "done at step 20" in output, output
    return workdir


def records(workdir):
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if "loss" in r]


def losses(workdir):
    return [(r["step"], r["loss"]) for r in records(workdir)]


def test_restart_after_a_kill_is_bit_for_bit_the_whole_run(whole, tmp_path):
    """And nothing but the steps since the last save is done again."""
    first = start(tmp_path, 20, 0.2, devices=DEVICES)
    wait_for(tmp_path / "state/10", first)
    time.sleep(0.3)
    first.send_signal(signal.SIGKILL)
    assert ended(first)[0] == -signal.SIGKILL
    code, output = ended(start(tmp_path, 20, 0, devices=DEVICES))
    assert code == 0 and "Resumed from step 1" in output, output
    chex.assert_trees_all_equal(final(tmp_path), final(whole))
    assert losses(tmp_path) == losses(whole)


def test_restart_after_sigterm_goes_on_from_the_step_it_was_at(whole, tmp_path):
    first = start(tmp_path, 20, 0.2, devices=DEVICES)
    wait_for(tmp_path / "state/5", first)
    first.send_signal(signal.SIGTERM)
    code, output = ended(first)
    assert code == 128 + signal.SIGTERM and "the same command goes on from there" in output, output
    stopped = max(int(p.name) for p in (tmp_path / "state").iterdir())
    code, output = ended(start(tmp_path, 20, 0, devices=DEVICES))
    assert code == 0 and f"Resumed from step {stopped}" in output, output
    chex.assert_trees_all_equal(final(tmp_path), final(whole))
    assert losses(tmp_path) == losses(whole)


def test_restart_after_ctrl_c(whole, tmp_path):
    """One saves and ends; so does the first of two, but the second does not wait for that."""
    first = start(tmp_path, 20, 0.2, devices=DEVICES)
    wait_for(tmp_path / "state/5", first)
    first.send_signal(signal.SIGINT)
    code, output = ended(first)
    assert code == 128 + signal.SIGINT and "the same command goes on from there" in output, output
    again = start(tmp_path, 20, 5, devices=DEVICES)  # seconds a batch: the update does not end soon
    wait_for_words("Resumed", again)
    again.send_signal(signal.SIGINT)
    wait_for_words("Ctrl-C again stops at once", again)
    again.send_signal(signal.SIGINT)
    wait_for_words("KeyboardInterrupt", again)
    assert ended(again)[0] not in (0, 128 + signal.SIGINT)
    code, output = ended(start(tmp_path, 20, 0, devices=DEVICES))
    assert code == 0, output
    chex.assert_trees_all_equal(final(tmp_path), final(whole))
    assert losses(tmp_path) == losses(whole)


def test_restart_on_another_mesh_gives_nearly_the_same(whole, tmp_path):
    first = start(tmp_path, 20, 0.2, devices=DEVICES)
    wait_for(tmp_path / "state/10", first)
    first.kill()
    ended(first)
    code, output = ended(start(tmp_path, 20, 0, devices=1))
    assert code == 0 and "Resumed from step" in output, output
    chex.assert_trees_all_close(final(tmp_path), final(whole), rtol=1e-5, atol=1e-6)
