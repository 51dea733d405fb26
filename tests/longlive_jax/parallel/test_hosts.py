"""Joining multi-host jobs, leaving them on errors, and the launch files."""

import os
import socket
import subprocess
import sys

import jax
import pytest
import yaml

from longlive_jax.cli.app import run
from longlive_jax.parallel.hosts import Hosts, abort_on_failure, join
from longlive_jax.spec import Failure, UserError


def test_parse_accepts_auto_and_an_address():
    assert Hosts.parse("auto") == Hosts()
    assert Hosts.parse("10.0.0.1:8476,4,3") == Hosts("10.0.0.1:8476", 4, 3)


@pytest.mark.parametrize(
    "text", ["", "10.0.0.1", "10.0.0.1:8476", "h:1,2,2", "h:99999,2,0", "h:1,x,0", "h:1,2,0,1"]
)
def test_other_values_of_hosts_are_errors(text, capsys):
    with pytest.raises(ValueError, match=r"HOST:PORT,PROCESSES,INDEX"):
        Hosts.parse(text)
    command = ["train", "--config=configs/small_world.py:ar", "--workdir=w", "--out=o"]
    assert run([*command, f"--hosts={text}"]) == 2
    assert "--hosts" in capsys.readouterr().err


MANAGERS = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "JAX_COORDINATOR", "JAX_LOCAL_DEVICE")
AUTO = "--hosts=auto: no Slurm, Open MPI or Kubernetes job found; give --hosts=HOST:PORT,PROCESSES"


WITHOUT_KUBERNETES = """
import sys
sys.modules["kubernetes"] = None  # as if its client were not installed
from longlive_jax.cli.app import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize("kubernetes", [False, True])
def test_auto_without_a_cluster_manager_is_an_error(kubernetes, repository):
    """In a new process, because JAX only joins a job before the first use of a device."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(MANAGERS)}
    if kubernetes:
        env["KUBERNETES_SERVICE_HOST"] = "10.0.0.1"
    command = ["train", "--config=configs/small_world.py:ar", "--workdir=w", "--out=o"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_KUBERNETES, *command, "--hosts=auto"],
        env=env,
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    message = done.stderr
    assert done.returncode == 2, message
    assert message.startswith(f"longlive: {AUTO}") and message.count("\n") == 1
    assert "longlive-jax[k8s]" in message


def test_a_failed_join_is_reported(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Kubernetes API Error: 403\n- Forbidden")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(
        Failure, match=r"could not join the job \(.*403 - Forbidden\); give --hosts"
    ):
        join(Hosts())
    with pytest.raises(Failure, match="as process 1 of 2"):
        join(Hosts("h:1", 2, 1))


def test_a_port_in_use_is_reported():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(Failure, match=f"port {port} cannot be used here .*another one"):
            join(Hosts(f"localhost:{port}", 2, 0))


def test_a_kubernetes_job_survives_preemption(repository):
    """Exits by SIGTERM do not count as failures, and a pod is not replaced while it is saving."""
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
def test_a_slurm_job_is_requeued_after_preemption(repository, tmp_path, code):
    (tmp_path / "srun").write_text(SRUN.format(folder=tmp_path / "calls", code=code))
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/calls/scontrol\n')
    (tmp_path / "calls").mkdir()
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
    scontrol = tmp_path / "calls" / "scontrol"
    requeue = scontrol.read_text() if scontrol.exists() else ""
    assert requeue == ("requeue 77\n" if code == 143 else "")
    srun = (tmp_path / "calls" / "srun").read_text()
    assert "--gpus-per-task" not in srun and "--gpu-bind=none --cpus-per-task=8" in srun
    assert srun.endswith("/here/.venv/bin/longlive train --hosts=auto --out=o\n")


def test_a_single_process_raises_as_usual():
    with pytest.raises(KeyError):
        abort_on_failure(lambda: {}["missing"])
    assert abort_on_failure(lambda: 3) == 3


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("no such thing"), 2, "longlive: no such thing\n"),
        (Failure("the disk is full"), 1, "longlive: the disk is full\n"),
        (KeyboardInterrupt(), 130, "longlive: interrupted\n"),
        (KeyError("missing"), 1, "process 0 of 2 failed:\nTraceback"),
    ],
)
def test_one_of_several_reports_and_exits_at_once(error, code, message, monkeypatch, capfd):
    def leave(number):
        raise SystemExit(number)

    def fail():
        raise error

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        abort_on_failure(fail)
    assert left.value.code == code and capfd.readouterr().err.startswith(message)
