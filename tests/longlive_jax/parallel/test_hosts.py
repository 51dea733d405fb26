"""How processes say where the others are."""

import os
import socket
import subprocess
import sys

import jax
import pytest
import yaml

from longlive_jax.cli.app import run
from longlive_jax.parallel.hosts import Hosts, join, leave_at_once
from longlive_jax.spec import Failure, UserError


def test_hosts_are_found_by_the_manager_or_by_address():
    assert Hosts.parse("auto") == Hosts()
    assert Hosts.parse("10.0.0.1:8476,4,3") == Hosts("10.0.0.1:8476", 4, 3)


@pytest.mark.parametrize(
    "text", ["", "10.0.0.1", "10.0.0.1:8476", "h:1,2,2", "h:99999,2,0", "h:1,x,0", "h:1,2,0,1"]
)
def test_anything_else_is_said(text, capsys):
    with pytest.raises(ValueError, match=r"HOST:PORT,PROCESSES,INDEX"):
        Hosts.parse(text)
    command = ["train", "--config=configs/small_world.py:ar", "--workdir=w", "--out=o"]
    assert run([*command, f"--hosts={text}"]) == 2
    assert "--hosts" in capsys.readouterr().err


MANAGERS = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "JAX_COORDINATOR", "JAX_LOCAL_DEVICE")
AUTO = "--hosts=auto: no Slurm, Open MPI or Kubernetes job found; give --hosts=HOST:PORT,PROCESSES"


@pytest.mark.parametrize("kubernetes", [False, True])
def test_no_cluster_manager(kubernetes, monkeypatch, capfd):
    for name in os.environ:
        if name.startswith(MANAGERS):
            monkeypatch.delenv(name)
    # Other tests of this process may have used a device already.
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    if kubernetes:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
        monkeypatch.setitem(sys.modules, "kubernetes", None)  # not installed
    command = ["train", "--config=configs/small_world.py:ar", "--workdir=w", "--out=o"]
    assert run([*command, "--hosts=auto"]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"longlive: {AUTO}") and said.count("\n") == 1
    assert "longlive-jax[k8s]" in said


def test_joining_that_fails(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Kubernetes API Error: 403\n- Forbidden")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(
        Failure, match=r"could not join the job \(.*403 - Forbidden\); give --hosts"
    ):
        join(Hosts())
    with pytest.raises(Failure, match="as process 1 of 2"):
        join(Hosts("h:1", 2, 1))


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(Failure, match=f"port {port} cannot be used here .*another one"):
            join(Hosts(f"localhost:{port}", 2, 0))


def test_a_kubernetes_job_outlives_preemption(repository):
    """Its pods' exits by SIGTERM do not count, and none is replaced while it still saves."""
    _, job = yaml.safe_load_all((repository / "launch" / "gke.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    assert spec["podReplacementPolicy"] == "Failed"
    disrupted, ended = spec["podFailurePolicy"]["rules"]
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget"}]
    codes = {"containerName": pod["containers"][0]["name"], "operator": "In", "values": [143]}
    assert ended["onExitCodes"] == codes
    assert disrupted["action"] == ended["action"] == "Ignore"


SRUN = """#!/bin/sh
echo "$@" > {folder}/srun
exit {code}
"""


@pytest.mark.parametrize("code", [0, 1, 143])
def test_a_slurm_job_is_put_back_when_it_was_told_to_stop(repository, tmp_path, code):
    (tmp_path / "srun").write_text(SRUN.format(folder=tmp_path / "said", code=code))
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said/scontrol\n')
    (tmp_path / "said").mkdir()
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_JOB_ID": "77",
        "SLURM_SUBMIT_DIR": "/here",
    }
    script = repository / "launch" / "slurm.sh"
    done = subprocess.run(["bash", script, "--out=o"], env=env, check=False)
    assert done.returncode == code
    asked = tmp_path / "said" / "scontrol"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 77\n" if code == 143 else "")
    said = (tmp_path / "said" / "srun").read_text()
    assert "--gpus-per-task" not in said and "--gpu-bind=none --cpus-per-task=8" in said
    assert said.endswith("/here/.venv/bin/longlive train --hosts=auto --out=o\n")


def test_alone_an_error_stays_an_error():
    with pytest.raises(KeyError):
        leave_at_once(lambda: {}["missing"])
    assert leave_at_once(lambda: 3) == 3


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("no such thing"), 2, "longlive: no such thing\n"),
        (Failure("the disk is full"), 1, "longlive: the disk is full\n"),
        (KeyboardInterrupt(), 130, "longlive: interrupted\n"),
        (KeyError("missing"), 1, "process 0 of 2 failed:\nTraceback"),
    ],
)
def test_one_of_several_says_why_and_waits_for_nobody(error, code, said, monkeypatch, capfd):
    def leave(number):
        raise SystemExit(number)

    def fail():
        raise error

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        leave_at_once(fail)
    assert left.value.code == code and capfd.readouterr().err.startswith(said)
