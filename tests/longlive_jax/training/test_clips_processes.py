"""`longlive train` on mp4 files: killed and resumed, in one process and in a job of two.

All runs use the same mesh, data 2 x sp 2, so they compute the numbers of the uninterrupted run: bit
for bit in one process, up to rounding where collectives go through gloo.
"""

import signal
import time

import chex
import jax
import numpy as np
import pytest

from longlive_jax.io.checkpoint import load_component
from tests.longlive_jax.training.processes import finish, free_port, longlive, wait_for
from tests.longlive_jax.training.stages.test_wan_ar import RECYCLING, command, records

STEPS, TIMEOUT = 12, 600
SETTINGS = ("mesh.data=2,mesh.fsdp=1,mesh.sp=2", f"loop.steps={STEPS}", "remat=none",
            "ffn_chunks=1", *RECYCLING)  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compilation cache of the single-process runs; in a job only the first process writes it."""
    return tmp_path_factory.mktemp("compilation_cache")


@pytest.fixture(scope="module")
def uninterrupted(data_dir, cache, tmp_path_factory):
    """Work directory of an uninterrupted run in one process."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = longlive(*arguments(data_dir, workdir), devices=4, cache=cache)
    code, output = finish(process, TIMEOUT)
    assert code == 0, output
    return workdir


def arguments(data_dir, workdir, *more):
    return [*command(data_dir, workdir, *SETTINGS), *more]


def start_job(data_dir, workdir, *more, devices=2):
    """Both processes of a job."""
    address = f"127.0.0.1:{free_port()},2"
    hosts = [f"--hosts={address},{i}" for i in range(2)]
    return [longlive(*arguments(data_dir, workdir, *more, host), devices=devices) for host in hosts]


def losses(workdir):
    return [(r["step"], r["loss"]) for r in records(workdir)]


def exported_dit(workdir):
    return load_component(f"{workdir}-out", "dit")[0]


def test_training_on_videos_resumed_after_a_kill_equals_the_uninterrupted_run(
    data_dir, uninterrupted, cache, tmp_path
):
    workdir = tmp_path / "run"
    killed = longlive(*arguments(data_dir, workdir), devices=4, cache=cache)
    wait_for(workdir / "state/4", killed, TIMEOUT)
    killed.send_signal(signal.SIGKILL)
    assert finish(killed)[0] == -signal.SIGKILL
    resumed = longlive(*arguments(data_dir, workdir), devices=4, cache=cache)
    code, output = finish(resumed, TIMEOUT)
    assert code == 0 and "Resumed from step" in output, output
    assert losses(workdir) == losses(uninterrupted)
    jax.tree.map(np.testing.assert_array_equal, exported_dit(workdir), exported_dit(uninterrupted))


def test_multiprocess_training_on_videos_resumes_after_a_process_dies(
    data_dir, uninterrupted, tmp_path
):
    """The surviving process exits with a message, and the same command resumes the job."""
    workdir = tmp_path / "run"
    survivor, victim = start_job(data_dir, workdir)
    wait_for(workdir / "state/4", survivor, TIMEOUT)
    victim.send_signal(signal.SIGKILL)
    began = time.monotonic()
    code, output = finish(survivor, TIMEOUT)
    assert time.monotonic() - began < 60
    assert code != 0, output
    # Either a collective fails first, or the missing heartbeat is noticed first.
    assert "process 0 of 2 failed" in output or "tasks are unhealthy" in output, output
    finish(victim)
    results = [finish(process, TIMEOUT) for process in start_job(data_dir, workdir)]
    assert all(code == 0 for code, _ in results), results
    assert "Resumed from step" in results[0][1] and "Resumed" not in results[1][1]
    want = [(step, pytest.approx(loss, rel=1e-5)) for step, loss in losses(uninterrupted)]
    assert losses(workdir) == want
    chex.assert_trees_all_close(
        exported_dit(workdir), exported_dit(uninterrupted), rtol=1e-4, atol=1e-5
    )


def test_multiprocess_online_encoding_splits_the_frames_between_processes(
    data_dir, uninterrupted, tmp_path
):
    """Each process has one of the two devices along sp, and decodes and encodes its frames."""
    changes = ("mesh.data=1", "loop.steps=3", f"videos={data_dir / 'videos'}", "anywhere=false")
    more = [f"--config.{change}" for change in changes]
    job = start_job(data_dir, tmp_path / "run", *more, devices=1)
    results = [finish(process, TIMEOUT) for process in job]
    assert all(code == 0 for code, _ in results), results
    want = [(step, pytest.approx(loss, rel=2e-4)) for step, loss in losses(uninterrupted)[:3]]
    assert losses(tmp_path / "run") == want
