"""Runs in several processes through gloo: equal to one process, and no hang when one fails."""

import signal
import time

import chex
import pytest

from tests.longlive_jax.training.processes import finish, free_port, start, wait_for
from tests.longlive_jax.training.test_restart import losses, records, restored_state
from tests.longlive_jax.training.toy_run import ROWS

STEPS = 10


def start_job(workdir, count, *, devices, delay="0", steps=STEPS):
    """All processes of a job."""
    port = free_port()
    return [
        start(workdir, steps, delay, f"127.0.0.1:{port},{count},{i}", devices=devices)
        for i in range(count)
    ]


def finish_job(processes):
    """Exit code and output of every process."""
    return [finish(p) for p in processes]


@pytest.fixture(scope="module")
def single_process(tmp_path_factory):
    """Work directory of a run in one process with four devices."""
    workdir = tmp_path_factory.mktemp("single_process")
    code, output = finish(start(workdir, STEPS, 0, devices=4))
    assert code == 0, output
    return workdir


@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_multiprocess_run_killed_and_resumed_equals_one_process(
    single_process, tmp_path, count, devices
):
    """State and metrics, with checkpoints; each process loads only its own rows."""
    killed = start_job(tmp_path, count, devices=devices, delay="0.2")
    wait_for(tmp_path / "state/5", killed[0])
    for process in killed:
        process.send_signal(signal.SIGKILL)
    finish_job(killed)
    results = finish_job(start_job(tmp_path, count, devices=devices))
    assert all(code == 0 for code, _ in results), results
    assert "Resumed from step" in results[0][1]
    assert not any("Resumed" in output for _, output in results[1:])
    got, want = restored_state(tmp_path, STEPS), restored_state(single_process, STEPS)
    chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-7)
    assert [step for step, _ in losses(tmp_path)] == list(range(1, STEPS + 1))
    assert all(record["skipped"] == ROWS for record in records(tmp_path))


def test_multiprocess_all_use_the_previous_checkpoint_if_one_process_cannot_read(
    single_process, tmp_path
):
    assert all(code == 0 for code, _ in finish_job(start_job(tmp_path, 2, devices=1)))
    written = list((tmp_path / f"state/{STEPS}").glob("**/ocdbt.process_1/d/*"))
    assert written
    for file in written:
        file.write_bytes(file.read_bytes()[:16])
    results = finish_job(start_job(tmp_path, 2, devices=1))
    assert all(code == 0 for code, _ in results), results
    assert f"The checkpoint of step {STEPS} is damaged" in results[0][1]
    assert "Resumed from step 5" in results[0][1]
    got, want = restored_state(tmp_path, STEPS), restored_state(single_process, STEPS)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


def test_multiprocess_sigterm_to_one_process_stops_all_after_the_same_step(tmp_path):
    job = start_job(tmp_path, 2, devices=1, delay="0.3", steps=40)
    wait_for(tmp_path / "state/5", job[0])
    job[1].send_signal(signal.SIGTERM)
    results = finish_job(job)
    assert all(code == 128 + signal.SIGTERM for code, _ in results), results
    assert all("stopped by signal 15 after step" in output for _, output in results), results
    stopped = max(int(p.name) for p in (tmp_path / "state").iterdir())
    assert all(f"after step {stopped}" in output for _, output in results)


def test_multiprocess_run_ends_when_one_process_fails(tmp_path):
    """It ends within a minute, and the failed process prints its error."""
    began = time.monotonic()
    results = finish_job(start_job(tmp_path, 2, devices=1, delay="fail=3"))
    assert all(code != 0 for code, _ in results), results
    assert "the data of step 3 cannot be read" in results[1][1]
    assert time.monotonic() - began < 60
