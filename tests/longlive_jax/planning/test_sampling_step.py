"""Laws of the compiled sampling step on H200: no copy of the cache, few others, in-place writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longlive_jax.planning import deviceless

ROOT = Path(__file__).resolve().parents[3]
CHUNK = 7040 * 3072 * 2
"""Bytes of one layer's keys of one chunk in bfloat16."""
LAYERS = 30
VARIANTS = {
    "dense": [],
    "batch": ["--batch=2"],
    "packed": ['--format={"storage": "nvfp4"}'],
    "relative": ['--policy={"relative_rope": true}'],
    "all sinks": ['--policy={"window": 3}'],
}

pytestmark = pytest.mark.skipif(deviceless.refusal() is not None, reason=f"{deviceless.refusal()}")


def report(*options):
    """The report on the step, from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "longlive_jax.planning.sampling", "--chip=h200", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check(step):
    """The laws; those of the whole model hold for its share of the layers."""
    batch, share = step["batch"], step["layers"] / LAYERS
    packed = step["format"].get("storage") == "nvfp4"
    slots = step["policy"].get("window", 4) - 1
    # 1. The largest copy is a sample's chunk on its way to its slot.
    assert step["largest_copy_bytes"] <= CHUNK < slots * CHUNK
    # 2. Copies of a model call.
    assert step["copied_bytes_per_call"] <= 4e9 * share * batch
    # 3. Memory: the cache is updated where it is.
    bits = 4.5 if packed else 16
    assert step["aliased_bytes"] >= 2 * step["layers"] * batch * slots * CHUNK * bits / 16
    assert step["temporary_bytes"] <= 2**30 * batch


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[] if name == "dense" else pytest.mark.slow)
        for name, options in VARIANTS.items()
    ],
)
def test_two_layers_copy_nothing_of_the_cache(options):
    check(report("--layers=2", *options))


def test_the_recorded_steps_of_the_5b_model_keep_the_laws():
    """All layers, as the slow test compiles them."""
    rows = json.loads((ROOT / "longlive_jax/bench/results/sampling_step_h200.json").read_text())
    assert [row["stacked"] for row in rows] == [True, False]
    assert all(row["layers"] == LAYERS for row in rows)
    check(rows[1])


@pytest.mark.slow
def test_the_5b_model_keeps_the_laws():
    check(report())
