"""Programs started beside the tests, which never outlive them."""

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
    """The program in a group of its own, on so many fake devices."""
    return _started(str(program), *arguments, devices=devices)


def longlive(*arguments: object, devices: int, cache: Path | None = None) -> subprocess.Popen:
    """`longlive ARGUMENTS` likewise, compiled in haste; compiled programs are kept in `cache`."""
    kept = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    kept["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    more = kept if cache is not None else {}
    return _started("-m", "longlive_jax", *arguments, devices=devices, flags=flags, **more)


def _started(*words: object, devices: int, flags: str = "", **more: str) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices} {flags}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env | more,
        cwd=ROOT,
        start_new_session=True,
    )


def ended(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str]:
    """Exit code and output, waited for."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"still running after {seconds} s:\n{output}") from None
    return process.returncode, output


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    """Until `path` exists; AssertionError if the process ends before."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"no {path}:\n{process.communicate()[0]}")
        time.sleep(0.02)


def wait_for_words(words: str, process: subprocess.Popen, seconds: float = 120) -> None:
    """Reads what it prints up to a line with them; AssertionError if there is none."""
    late = threading.Timer(seconds, process.kill)
    late.start()
    lines = [process.stdout.readline()]
    while words not in lines[-1] and lines[-1]:
        lines.append(process.stdout.readline())
    late.cancel()
    assert lines[-1], f"never printed {words!r}:\n{''.join(lines)}"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
