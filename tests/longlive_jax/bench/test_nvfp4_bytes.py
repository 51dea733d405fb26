"""Bytes of one linear in programs compiled for a GB200, and the counting itself."""

import pytest

from longlive_jax.bench import nvfp4_bytes
from longlive_jax.planning import deviceless
from longlive_jax.planning.hlo_bytes import program_bytes
from longlive_jax.quant.traffic import COUNTED, traffic_note

HLO = """
%fused (p: bf16[4,8]) -> f32[4,8] {
  ROOT %c = f32[4,8]{1,0} convert(%p)
}

ENTRY %main (x: bf16[4,8]) -> (f32[4,8], f4e2m1fn[16]) {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %k = (f32[4,8]{1,0}, f4e2m1fn[16]{0:E(4)}) custom-call(%y, /*index=1*/%x), custom_call_target="k"
  %z = f32[4,8]{1,0} get-tuple-element(%k), index=0
  ROOT %t = (f32[4,8]{1,0}, f4e2m1fn[16]{0:E(4)}) tuple(%z, %y)
}
"""


def test_every_kernel_reads_its_operands_and_writes_its_results():
    fusion, call = 64 + 128, 128 + 64 + 128 + 8
    assert program_bytes(HLO) == fusion + call


@pytest.fixture(scope="module")
def report():
    if (why := deviceless.refusal()) is not None:
        pytest.skip(why)
    return nvfp4_bytes.count("gb200", paths=("bf16", "mosaic"))


def test_a_linear_moves_less_than_in_bfloat16(report):
    """Limits of the path that "auto" takes on a GB200 whose records prove the kernels."""
    counted = report["bytes"][report["auto"]["proven"]]
    assert counted["inference"] <= 170e6
    assert counted["training"] <= 480e6
    assert counted["training"] < report["bytes"]["bf16"]["training"]


def test_nothing_unproven_is_the_default(report):
    assert report["auto"]["now"] == "xla"


def test_the_numbers_that_a_run_prints_are_the_counted_ones(report):
    for path, phases in report["bytes"].items():
        for kind in ("inference", "training"):
            assert COUNTED[path][kind] == round(phases[kind] / 1e6), (path, kind)


@pytest.mark.slow
def test_the_numbers_of_the_xla_path_are_the_counted_ones():
    if (why := deviceless.refusal()) is not None:
        pytest.skip(why)
    counted = nvfp4_bytes.count("gb200", paths=("xla",))["bytes"]["xla"]
    assert COUNTED["xla"] == {kind: round(counted[kind] / 1e6) for kind in COUNTED["xla"]}


def test_a_run_says_where_packing_does_not_save_time():
    note = traffic_note("xla", trains=True)
    assert "saves memory, not time" in note and "(counted for a GB200)" in note
    assert traffic_note("mosaic", trains=True) == traffic_note("reference", trains=True) == ""
