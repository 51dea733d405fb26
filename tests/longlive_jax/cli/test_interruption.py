"""SIGTERM and Ctrl-C between, within and after chunks, also in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import av
import pytest

from longlive_jax.cli.interruption import Interruption
from longlive_jax.io.signals import Stopped
from tests.tiny import write_tiny


def test_a_signal_while_files_are_written_waits():
    done = []
    with pytest.raises(Stopped) as stopped, Interruption() as interruption, interruption.deferred():
        for item in interruption.waiting(iter(range(3))):
            if item == 1:
                signal.raise_signal(signal.SIGTERM)
            done.append(item)
    assert done == [0, 1] and stopped.value.code == 143


def test_a_signal_interrupts_waiting_at_once():
    def items():
        yield 0
        signal.raise_signal(signal.SIGINT)
        yield 1

    done = []
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption, interruption.deferred():
        done += interruption.waiting(items())
    assert interruption.signal == signal.SIGINT


def test_a_second_signal_interrupts_finishing():
    steps = []
    with pytest.raises(Stopped), Interruption() as interruption, interruption.deferred():
        signal.raise_signal(signal.SIGTERM)
        steps.append("goes on")
        signal.raise_signal(signal.SIGTERM)
        steps.append("never")
    assert steps == ["goes on"]


def test_a_signal_while_loading_ends_at_once():
    with pytest.raises(Stopped), Interruption():
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the signal was ignored")


def frames_of(path):
    with av.open(str(path)) as file:
        return sum(1 for _ in file.decode(video=0))


def test_sigterm_leaves_a_finished_video(tmp_path):
    checkpoint = write_tiny(tmp_path / "checkpoint")
    script, out = tmp_path / "shots.yaml", tmp_path / "out"
    script.write_text("shots: [{prompt: a cat runs, chunks: 100000}]")
    command = [sys.executable, "-m", "longlive_jax", "sample", f"--script={script}"]
    command += [f"--out={out}", f"--checkpoint={checkpoint}", "--format=mp4,gif"]
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles in half the time
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        until = time.monotonic() + 120
        while not ((part := out / "video.part.gif").exists() and part.stat().st_size > 10_000):
            assert process.poll() is None and time.monotonic() < until, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143 and "Traceback" not in errors
    names = {"video.mp4", "video.gif", "video.json", "strip.png"}
    assert {path.name for path in out.iterdir()} == names
    record = json.loads((out / "video.json").read_text())
    frames = frames_of(out / "video.mp4")
    assert record["interrupted"] and record["video"]["frames"] == frames > 0
    assert f"video.mp4: {frames} frames" in printed
    assert frames_of(out / "video.gif") == (frames + 1) // 2
