"""Copies counted from HLO text, written by hand."""

import dataclasses

import pytest

from longlive_jax.planning.copies import copied_bytes, copies

HLO = """
HloModule example

%sliced.1 (p: bf16[3,8,4], i: s32[]) -> bf16[1,8,4] {
  %p = bf16[3,8,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,8,4]{2,1,0} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,8,4}
}

%half_computed.1 (p: f32[8], q: f32[8]) -> f32[16] {
  %p = f32[8]{0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %sine = f32[8]{0} sine(%p)
  ROOT %both = f32[16]{0} concatenate(%sine, %q), dimensions={0}
}

%written.1 (p: f32[3,8], q: f32[8], i: s32[]) -> f32[3,8] {
  %p = f32[3,8]{1,0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,8]{1,0} bitcast(%q)
  ROOT %update = f32[3,8]{1,0} dynamic-update-slice(%p, %row, %i, %zero)
}

%computed.1 (p: f32[3,8], q: f32[8], i: s32[]) -> f32[3,8] {
  %p = f32[3,8]{1,0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %sine = f32[8]{0} sine(%q)
  %row = f32[1,8]{1,0} bitcast(%sine)
  ROOT %update = f32[3,8]{1,0} dynamic-update-slice(%p, %row, %i, %zero)
}

%body.1 (c: (s32[], bf16[3,8,4])) -> (s32[], bf16[3,8,4]) {
  %c = (s32[], bf16[3,8,4]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %stack = bf16[3,8,4]{2,1,0} get-tuple-element(%c), index=1
  %layer = bf16[1,8,4]{2,1,0} fusion(%stack, %i), kind=kLoop, calls=%sliced.1, metadata={op_name="scan"}
  %start = ((bf16[3,8,4]{2,1,0}, s32[]), bf16[1,8,4]{2,1,0}, u32[]) fusion-start(%stack, %i), kind=kLoop, calls=%sliced.1
  %done = bf16[1,8,4]{2,1,0} fusion-done(%start)
  ROOT %t = (s32[], bf16[3,8,4]{2,1,0}) tuple(%i, %stack)
}

ENTRY %main (x: f32[3,8], y: f32[8], s: bf16[3,8,4]) -> f32[3,8] {
  %x = f32[3,8]{1,0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %s = bf16[3,8,4]{2,1,0} parameter(2)
  %i = s32[] constant(1)
  %init = (s32[], bf16[3,8,4]{2,1,0}) tuple(%i, %s)
  %loop = (s32[], bf16[3,8,4]{2,1,0}) while(%init), condition=%condition.1, body=%body.1TRIPS
  %joined = f32[16]{0} fusion(%y, %y), kind=kInput, calls=%half_computed.1
  %copy.1 = f32[3,8]{1,0} copy(%x)
  %moved = f32[3,8]{1,0} fusion(%copy.1, %y, %i), kind=kLoop, calls=%written.1
  %made = f32[3,8]{1,0} fusion(%moved, %y, %i), kind=kLoop, calls=%computed.1
  ROOT %seen = f32[3,8]{1,0} bitcast(%made)
}
"""  # noqa: E501
TRIPS = ', backend_config={"known_trip_count":{"n":"30"}}'


def test_elements_that_are_not_computed_are_read_and_written():
    kernels = copies(HLO.replace("TRIPS", TRIPS))
    layer, row = 8 * 4 * 2, 8 * 4  # bytes
    assert {x.name: (x.runs, x.bytes) for x in kernels} == {
        "layer": (30, 2 * layer),
        "start": (30, 2 * layer),
        "joined": (1, 2 * row),  # the other half is computed
        "copy.1": (1, 2 * 3 * row),
        "moved": (1, 2 * row),  # in place; the update that computes its row is no copy
    }
    assert copied_bytes(kernels) == 30 * 4 * layer + 10 * row
    assert next(x for x in kernels if x.name == "layer").op_name == "scan"
    assert dataclasses.asdict(kernels[0])["result"].startswith("bf16[1,8,4]")


def test_a_loop_of_unknown_length_is_rejected():
    with pytest.raises(ValueError, match="unknown length contains the copy layer"):
        copies(HLO.replace("TRIPS", ""))
