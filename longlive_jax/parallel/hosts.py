"""One program on several hosts: joining them, and leaving without waiting for the dead.

Every process runs the same command. Under Slurm, Open MPI and Kubernetes jobs JAX finds the others
by itself; anywhere else the command says where the first process is.
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
"""A process that has not been heard of for so long ends the job."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Who takes part. `coordinator` HOST:PORT of process 0; None: the cluster's manager knows."""

    coordinator: str | None = None
    processes: int | None = None
    index: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Hosts":
        """`auto`, or `HOST:PORT,PROCESSES,INDEX`; ValueError for anything else."""
        if text == "auto":
            return cls()
        words = text.split(",")
        try:
            address, processes, index = words[0], int(words[1]), int(words[2])
            host, port = address.rsplit(":", 1)
            ok = len(words) == 3 and host and 0 < int(port) < 65536 and 0 <= index < processes
        except (ValueError, IndexError):
            ok = False
        if not ok:
            raise ValueError(
                f"{text!r} is neither `auto` nor HOST:PORT,PROCESSES,INDEX, such as "
                "10.0.0.1:8476,4,0 for the first of four"
            )
        return cls(address, processes, index)


def join(hosts: Hosts) -> None:
    """Joins the job; before the first use of a device.

    Raises UserError if no coordinator is given and no cluster manager knows one, Failure if this is
    the first process and its port is taken, or if the manager cannot be asked. If the others do not
    come within five minutes, JAX itself ends the process with what it knows.
    """
    if hosts.coordinator is not None and hosts.index == 0:
        _check_free(hosts.coordinator)
    try:
        with warnings.catch_warnings():
            # Without the client JAX passes Kubernetes over; what that means is said below.
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
        why = " ".join(str(error).split())[:300]
        place = (
            "" if hosts.coordinator is None else f" as process {hosts.index} of {hosts.processes}"
        )
        raise Failure(
            f"--hosts: could not join the job{place} ({why}); give --hosts=HOST:PORT,PROCESSES,"
            "INDEX, or see that the first process can be reached, and start all again"
        ) from error


def _check_free(address: str) -> None:
    """Failure if something listens on the port already, on which JAX would crash."""
    port = int(address.rsplit(":", 1)[1])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise Failure(
                f"--hosts: port {port} cannot be used here ({error.strerror}); end what holds it, "
                "or give all processes another one"
            ) from error


def leave_at_once(call: Callable[[], int]) -> int:
    """`call()`; if it fails in one process of several, that process ends on the spot.

    An exception alone would wait at the end for the others, who wait for this process. The exit
    code is that of a `Failure`, 2 for a UserError, 130 for Ctrl-C, else 1.
    """
    try:
        return call()
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        said, code = _last_words(error)
        sys.stdout.flush()
        sys.stderr.write(said + "\n")
        sys.stderr.flush()
        os._exit(code)


def _last_words(error: BaseException) -> tuple[str, int]:
    """What to say of an error that ends this process, and its exit code."""
    if isinstance(error, Failure | UserError):
        return f"longlive: {error}", error.code if isinstance(error, Failure) else 2
    if isinstance(error, KeyboardInterrupt):
        return "longlive: interrupted", 130
    place = f"process {jax.process_index()} of {jax.process_count()}"
    return f"{place} failed:\n{traceback.format_exc().rstrip()}", 1


def first_process() -> bool:
    """Whether this process is the one that speaks, and writes what belongs to the whole job."""
    return jax.process_index() == 0


def readable(tree: Any) -> Any:
    """Arrays that this process can read whole; if there are several, NumPy's on every host.

    All processes call it.
    """
    if jax.process_count() == 1:
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)
