"""The model's shares against published measurements that it was not fitted to."""

import importlib.util
import json

import pytest

from longlive_jax.bench import calibration
from longlive_jax.planning import deviceless
from longlive_jax.planning.kernel_model import attention_share, model_share, step_cycles

PEAK = 989
ROWS = {row["case"]: row for row in json.loads(calibration.TABLE.read_text())}
WITHIN = 0.10
"""Largest difference between modelled and measured share."""


def share(row):
    return attention_share(row["kernels"], "sm_90a", useful=row["useful"], width=row["width"])


@pytest.mark.parametrize(
    "case", [case for case, row in ROWS.items() if row["spilled_bytes"] < 2048]
)
def test_the_share_of_a_measured_kernel_is_within_ten_points(case):
    row = ROWS[case]
    assert abs(share(row) - row["measured_tflops"] / PEAK) < WITHIN


def test_published_speeds_are_those_that_the_model_must_meet():
    speeds = {case: round(row["measured_tflops"]) for case, row in ROWS.items()}
    assert speeds["forward, width 128"] == 682
    assert speeds["backward, width 128"] == 492


def test_kernels_that_spill_kilobytes_are_outside_the_model():
    assert [case for case, row in ROWS.items() if row["spilled_bytes"] >= 2048] == [
        "backward, width 256"
    ]


def test_cycles_of_a_step_are_those_of_the_units():
    (facts,) = ROWS["forward, width 128"]["kernels"]
    cycles = step_cycles(facts, "sm_90a")
    keys = 128
    assert cycles["tensor_cycles"] == 2 * 2 * 64 * keys * 128 / 2048  # two warpgroups, two products
    tiles = 2 * keys * 128 * 2  # keys and values, written once
    queries = 64 * 128 * 2
    assert cycles["smem_cycles"] == (tiles + 2 * (queries + tiles)) / 128
    assert cycles["softmax_cycles"] == 2 * (64 + 2) * 8  # and two rows of a thread are rescaled


def test_gradients_are_those_of_the_backward_kernels():
    forward, backward = ROWS["forward, width 128"], ROWS["backward, width 128"]
    kernels = [*forward["kernels"], *backward["kernels"]]
    assert model_share("attention_gradients_hopper", kernels, "sm_90a") == share(backward)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed")
@pytest.mark.skipif(deviceless.refusal() is not None, reason=str(deviceless.refusal()))
@pytest.mark.parametrize("case", ROWS)
def test_the_table_is_what_compiling_gives(case):
    assert calibration.row(case)["kernels"] == ROWS[case]["kernels"]
