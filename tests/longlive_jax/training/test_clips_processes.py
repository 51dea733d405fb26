"""Training on mp4 files by the command itself, killed: in one process, and in two of a job.

The mesh is the same throughout, data 2 and sp 2, so all runs have the numbers of the one that
nothing interrupts: bit for bit in one process, to rounding where the sums go through gloo.
"""

import signal
import time

import chex
import jax
import numpy as np
import pytest

from longlive_jax.io.checkpoint import load_component
from tests.longlive_jax.training.processes import ended, free_port, longlive, wait_for
from tests.longlive_jax.training.stages.test_wan_ar import RECYCLED, command, records

STEPS, LONG = 12, 600
SETTINGS = ("mesh.data=2,mesh.fsdp=1,mesh.sp=2", f"loop.steps={STEPS}", "remat=false",
            "ffn_chunks=1", *RECYCLED)  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Programs that runs in one process share; of a job's processes only the first writes any."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def whole(places, cache, tmp_path_factory):
    """The run in one process that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    code, output = ended(longlive(*words(places, workdir), devices=4, cache=cache), LONG)
    assert code == 0, output
    return workdir


def words(places, workdir, *more):
    return [*command(places, workdir, *SETTINGS), *more]


def job(places, workdir, *more, devices=2):
    """Both processes of a run."""
    at = f"127.0.0.1:{free_port()},2"
    hosts = [f"--hosts={at},{i}" for i in range(2)]
    return [longlive(*words(places, workdir, *more, host), devices=devices) for host in hosts]


def losses(workdir):
    return [(r["step"], r["loss"]) for r in records(workdir)]


def trained(workdir):
    return load_component(f"{workdir}-out", "dit")[0]


def test_restart_of_training_on_videos_after_a_kill_is_bit_for_bit_the_whole_run(
    places, whole, cache, tmp_path
):
    workdir = tmp_path / "run"
    first = longlive(*words(places, workdir), devices=4, cache=cache)
    wait_for(workdir / "state/4", first, LONG)
    first.send_signal(signal.SIGKILL)
    assert ended(first)[0] == -signal.SIGKILL
    code, output = ended(longlive(*words(places, workdir), devices=4, cache=cache), LONG)
    assert code == 0 and "Resumed from step" in output, output
    assert losses(workdir) == losses(whole)
    jax.tree.map(np.testing.assert_array_equal, trained(workdir), trained(whole))


def test_multiprocess_training_on_videos_survives_the_death_of_a_process(places, whole, tmp_path):
    """The other one ends and says so; the same command then goes on as if nothing had been."""
    workdir = tmp_path / "run"
    first, second = job(places, workdir)
    wait_for(workdir / "state/4", first, LONG)
    second.send_signal(signal.SIGKILL)
    began = time.monotonic()
    code, output = ended(first, LONG)
    assert time.monotonic() - began < 60
    assert code != 0, output
    # Whichever comes first: a collective that breaks, or a process that is not heard of.
    assert "process 0 of 2 failed" in output or "tasks are unhealthy" in output, output
    ended(second)
    found = [ended(process, LONG) for process in job(places, workdir)]
    assert all(code == 0 for code, _ in found), found
    assert "Resumed from step" in found[0][1] and "Resumed" not in found[1][1]
    assert losses(workdir) == [(i, pytest.approx(x, rel=1e-5)) for i, x in losses(whole)]
    chex.assert_trees_all_close(trained(workdir), trained(whole), rtol=1e-4, atol=1e-5)


def test_multiprocess_training_straight_from_videos_decodes_them_in_halves(places, whole, tmp_path):
    """Each process one of two devices of every sequence, and the frames that this one encodes."""
    changes = ("mesh.data=1", "loop.steps=3", f"videos={places / 'videos'}", "anywhere=false")
    more = [f"--config.{change}" for change in changes]
    found = [ended(process, LONG) for process in job(places, tmp_path / "run", *more, devices=1)]
    assert all(code == 0 for code, _ in found), found
    assert losses(tmp_path / "run") == [
        (i, pytest.approx(x, rel=2e-4)) for i, x in losses(whole)[:3]
    ]
