"""One run in several processes, through gloo: the numbers of one, and no waiting for the dead."""

import signal
import time

import chex
import pytest

from tests.longlive_jax.training.processes import ended, free_port, start, wait_for
from tests.longlive_jax.training.test_restart import final, losses, records
from tests.longlive_jax.training.toy_run import ROWS

STEPS = 10


def job(workdir, count, *, devices, delay="0", steps=STEPS):
    """All processes of a run."""
    port = free_port()
    return [
        start(workdir, steps, delay, f"127.0.0.1:{port},{count},{i}", devices=devices)
        for i in range(count)
    ]


def outcome(processes):
    return [ended(p) for p in processes]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run in one process of four devices."""
    workdir = tmp_path_factory.mktemp("alone")
    code, output = ended(start(workdir, STEPS, 0, devices=4))
    assert code == 0, output
    return workdir


@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_multiprocess_run_killed_and_resumed_equals_one_process(alone, tmp_path, count, devices):
    """Data, metrics, checkpoint and restart; each process reads only its own rows."""
    first = job(tmp_path, count, devices=devices, delay="0.2")
    wait_for(tmp_path / "state/5", first[0])
    for process in first:
        process.send_signal(signal.SIGKILL)
    outcome(first)
    found = outcome(job(tmp_path, count, devices=devices))
    assert all(code == 0 for code, _ in found), found
    assert "Resumed from step" in found[0][1]
    assert not any("Resumed" in output for _, output in found[1:])
    chex.assert_trees_all_close(final(tmp_path, STEPS), final(alone, STEPS), rtol=1e-6, atol=1e-7)
    assert [step for step, _ in losses(tmp_path)] == list(range(1, STEPS + 1))
    assert all(record["skipped"] == ROWS for record in records(tmp_path))


def test_multiprocess_damage_that_one_process_meets_sends_all_back(alone, tmp_path):
    assert all(code == 0 for code, _ in outcome(job(tmp_path, 2, devices=1)))
    written = list((tmp_path / f"state/{STEPS}").glob("**/ocdbt.process_1/d/*"))
    assert written
    for file in written:
        file.write_bytes(file.read_bytes()[:16])
    found = outcome(job(tmp_path, 2, devices=1))
    assert all(code == 0 for code, _ in found), found
    assert f"The checkpoint of step {STEPS} is damaged" in found[0][1]
    assert "Resumed from step 5" in found[0][1]
    chex.assert_trees_all_close(final(tmp_path, STEPS), final(alone, STEPS), rtol=1e-5, atol=1e-6)


def test_multiprocess_sigterm_to_one_stops_all_after_the_same_step(tmp_path):
    first = job(tmp_path, 2, devices=1, delay="0.3", steps=40)
    wait_for(tmp_path / "state/5", first[0])
    first[1].send_signal(signal.SIGTERM)
    found = outcome(first)
    assert all(code == 128 + signal.SIGTERM for code, _ in found), found
    assert all("stopped by signal 15 after step" in output for _, output in found), found
    stopped = max(int(p.name) for p in (tmp_path / "state").iterdir())
    assert all(f"after step {stopped}" in output for _, output in found)


def test_multiprocess_run_ends_when_one_process_fails(tmp_path):
    """In under a minute, with its error shown."""
    began = time.monotonic()
    found = outcome(job(tmp_path, 2, devices=1, delay="fail=3"))
    assert all(code != 0 for code, _ in found), found
    assert "the data of step 3 cannot be read" in found[1][1]
    assert time.monotonic() - began < 60
