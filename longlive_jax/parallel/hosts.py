"""Multi-host jobs: joining the job, and ending a failed process without waiting for the others.

Every process runs the same command. In Slurm, Open MPI and Kubernetes jobs JAX finds the other
processes by itself; elsewhere the command line gives the address of the first process.
"""

import dataclasses
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

from longlive_jax.spec import Failure, UserError

HEARTBEAT_SECONDS = 30
"""The job ends when a process has sent no heartbeat for this many seconds."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of a job; all fields are None if a cluster manager provides them.

    Attributes:
      coordinator: HOST:PORT of process 0.
      processes: number of processes in the job.
      index: index of this process, from 0.
    """

    coordinator: str | None = None
    processes: int | None = None
    index: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Hosts":
        """Parses `auto` or `HOST:PORT,PROCESSES,INDEX`; raises ValueError for anything else."""
        if text == "auto":
            return cls()
        values = text.split(",")
        try:
            address, processes, index = values[0], int(values[1]), int(values[2])
            host, port = address.rsplit(":", 1)
            ok = len(values) == 3 and host and 0 < int(port) < 65536 and 0 <= index < processes
        except (ValueError, IndexError):
            ok = False
        if not ok:
            raise ValueError(
                f"{text!r} is neither `auto` nor HOST:PORT,PROCESSES,INDEX, such as "
                "10.0.0.1:8476,4,0 for the first of four"
            )
        return cls(address, processes, index)


def join(hosts: Hosts) -> None:
    """Joins the job. Call it before any JAX device is used.

    If the other processes do not join within five minutes, JAX itself ends this process with an
    error message.

    Raises:
      UserError: no coordinator is given and no cluster manager provides one.
      Failure: this is the first process and its port is in use, or the manager cannot be reached.
    """
    if hosts.coordinator is not None and hosts.index == 0:
        _check_free(hosts.coordinator)
    try:
        with warnings.catch_warnings():
            # JAX skips Kubernetes if its client is not installed; the error below explains that.
            warnings.filterwarnings("ignore", message=r"\s*Kubernetes environment detected")
            jax.distributed.initialize(
                hosts.coordinator,
                hosts.processes,
                hosts.index,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except ValueError as error:
        if hosts.coordinator is not None:
            raise UserError(f"--hosts: {error}") from error
        raise UserError(
            "--hosts=auto: no Slurm, Open MPI or Kubernetes job found; give "
            "--hosts=HOST:PORT,PROCESSES,INDEX (Kubernetes is only found with longlive-jax[k8s])"
        ) from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        process = (
            "" if hosts.coordinator is None else f" as process {hosts.index} of {hosts.processes}"
        )
        raise Failure(
            f"--hosts: could not join the job{process} ({reason}); give --hosts=HOST:PORT,"
            "PROCESSES,INDEX, or check that the first process is reachable, and restart all of them"
        ) from error


def _check_free(address: str) -> None:
    """Raises Failure if the port is already in use, which would crash JAX."""
    port = int(address.rsplit(":", 1)[1])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise Failure(
                f"--hosts: port {port} cannot be used here ({error.strerror}); stop the process "
                "that uses it, or give all processes another one"
            ) from error


def abort_on_failure(call: Callable[[], int]) -> int:
    """Runs `call()`; in a multi-process job, an exception ends this process immediately.

    With a normal exit this process would wait for the others at shutdown, while they wait for it in
    a collective. The exit code is a `Failure`'s own, 2 for a UserError, 130 for Ctrl-C, else 1.
    """
    try:
        return call()
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        message, code = _message_and_code(error)
        sys.stdout.flush()
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
        os._exit(code)


def _message_and_code(error: BaseException) -> tuple[str, int]:
    """The message and the exit code for an error that ends this process."""
    if isinstance(error, Failure | UserError):
        return f"longlive: {error}", error.code if isinstance(error, Failure) else 2
    if isinstance(error, KeyboardInterrupt):
        return "longlive: interrupted", 130
    process = f"process {jax.process_index()} of {jax.process_count()}"
    return f"{process} failed:\n{traceback.format_exc().rstrip()}", 1


def is_first_process() -> bool:
    """Whether this is process 0, which prints and writes on behalf of the job."""
    return jax.process_index() == 0


def gather_to_hosts(tree: Any) -> Any:
    """A tree whose arrays this process can read in full.

    With several processes they are NumPy copies on every host, otherwise `tree` itself. All
    processes must call it.
    """
    if jax.process_count() == 1:
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)
