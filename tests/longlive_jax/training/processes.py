"""Subprocesses for the tests: start them, wait for them, and kill them on a timeout."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

PROGRAM = Path(__file__).with_name("toy_run.py")
ROOT = Path(__file__).resolve().parents[3]


def start(*arguments: object, devices: int, program: Path = PROGRAM) -> subprocess.Popen:
    """Starts `program` in its own process group, on `devices` simulated CPU devices."""
    return _start_python(str(program), *arguments, devices=devices)


def longlive(*arguments: object, devices: int, cache: Path | None = None) -> subprocess.Popen:
    """Starts `longlive ARGUMENTS` like `start`, with XLA's expensive passes off.

    `cache` is the directory of the persistent compilation cache, if any.
    """
    variables = {}
    if cache is not None:
        variables = {
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
        }
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    return _start_python(
        "-m", "longlive_jax", *arguments, devices=devices, flags=flags, **variables
    )


def _start_python(
    *arguments: object, devices: int, flags: str = "", **variables: str
) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices} {flags}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env | variables,
        cwd=ROOT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str]:
    """Waits for a process and returns its exit code and output; kills it after `seconds`."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"still running after {seconds} s:\n{output}") from None
    return process.returncode, output


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    """Waits until `path` exists; AssertionError if the process ends first."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"no {path}:\n{process.communicate()[0]}")
        time.sleep(0.02)


def wait_for_output(text: str, process: subprocess.Popen, seconds: float = 120) -> None:
    """Reads the output up to the first line that contains `text`; AssertionError if none does."""
    timeout = threading.Timer(seconds, process.kill)
    timeout.start()
    lines = [process.stdout.readline()]
    while text not in lines[-1] and lines[-1]:
        lines.append(process.stdout.readline())
    timeout.cancel()
    assert lines[-1], f"never printed {text!r}:\n{''.join(lines)}"


def free_port() -> int:
    """A TCP port that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
