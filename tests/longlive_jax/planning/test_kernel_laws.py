"""Rules of the hardware: each bites on the numbers of a kernel that breaks it."""

import dataclasses

import pytest

from longlive_jax.bench import kernels
from longlive_jax.planning import deviceless
from longlive_jax.planning.kernel_laws import violations
from longlive_jax.planning.tma import Descriptor, descriptors

STEP = {"products": [{"shape": [128, 128, 16], "count": 8, "pair": False}]}
FACTS = {
    "register_pool": 168 * 384,
    "registers_asked": (88 + 208 + 208) * 128,
    "warpgroup_registers": [88, 208, 208],
    "named_barriers": 16,
    "tma_violations": [],
    "roles": [{"step": STEP}],
}
GOOD = {
    "architecture": "sm_100a",
    "spilled_bytes": 0,
    "shared_bytes": 232_448,
    "tensor_columns": 512,
    "lacking": [],
    "unread": None,
    "facts": FACTS,
}


def broken(name="attention_forward_blackwell", **facts):
    return violations(name, GOOD | {"facts": FACTS | facts}, "sm_100a")


def test_a_kernel_at_the_limits_is_good():
    assert broken() == []


def test_warpgroups_that_ask_for_more_than_the_pool_wait_for_ever():
    # `attention_gradients_blackwell` as it was before its budget was repaired.
    asked = {"warpgroup_registers": [96, 208, 208], "registers_asked": (96 + 208 + 208) * 128}
    assert broken("attention_gradients_blackwell", **asked) == [
        "its warpgroups ask for 96 + 208 + 208 registers a thread, 65536 in all, of a pool of "
        "64512: it waits for ever"
    ]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"register_pool": 70_000}, "70000 registers at launch, more than 65536"),
        ({"named_barriers": 17}, "17 hardware barriers, more than 16"),
        ({"tma_violations": ["a TMA copy has a box of 512 elements"]}, "a box of 512 elements"),
    ],
)
def test_other_limits(facts, message):
    (problem,) = broken(**facts)
    assert message in problem


def test_short_steps_of_forward_attention_on_one_blackwell_multiprocessor():
    short = STEP["products"][0] | {"shape": [128, 64, 16]}
    pair = short | {"pair": True}
    assert broken(roles=[{"step": {"products": [short]}}]) == [
        "steps of 64 keys on one multiprocessor, fewer than 128"
    ]
    assert broken(roles=[{"step": {"products": [pair]}}]) == []
    assert broken("attention_gradients_blackwell", roles=[{"step": {"products": [short]}}]) == []


def test_code_that_cannot_be_read_is_a_failure():
    report = GOOD | {"facts": None, "unread": "ValueError: no shape"}
    assert violations("x", report, "sm_100a") == [
        "its machine code cannot be read: ValueError: no shape"
    ]


COPY = Descriptor(16, (2, 128, 2, 8, 64), (128, 2048, 64, 256, 1), (1, 16, 2, 8, 64), 128)


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        ({}, []),
        ({"strides": (128, 2048, 64, 100, 1)}, ["a stride that 16 bytes do not divide"]),
        ({"box": (1, 16, 2, 257, 64)}, ["a box of 257 elements"]),
        ({"box": (1, 16, 2, 8, 4)}, ["an inner box of 8 bytes"]),
        ({"swizzle": 64}, ["an inner box of 128 bytes in swizzled rows of 64"]),
        ({"swizzle": 16, "box": (1, 16, 2, 8, 128)}, []),
    ],
)
def test_tma_descriptors(change, problems):
    copy = dataclasses.replace(COPY, **change)
    assert copy.violations() == [f"a TMA copy has {problem}" for problem in problems]


def test_descriptors_are_read_from_the_first_module(tmp_path):
    log = tmp_path / "body_0.mlir-passes.log"
    log.write_text(
        "// -----// IR Dump Before A //----- //\n"
        "%1, %2:2, %3:2 = memref.extract_strided_metadata %0 : "
        "memref<4x64xbf16, strided<[64, 1]>>\n"
        "%10 = arith.constant 128 : i64\n%11 = arith.constant 2 : i64\n"
        "%12 = arith.constant 64 : i64\n%13 = llvm.alloca %11 x i64 : (i64) -> !llvm.ptr\n"
        "%14 = llvm.getelementptr %13[0] : (!llvm.ptr) -> !llvm.ptr, i64\n"
        "llvm.store %11, %14 : i64, !llvm.ptr\n"
        "%15 = llvm.getelementptr %13[1] : (!llvm.ptr) -> !llvm.ptr, i64\n"
        "llvm.store %12, %15 : i64, !llvm.ptr\n"
        "call @mosaic_gpu_init_tma_desc(%a, %b, %c, %d, %e, %f, %10, %13) : ()\n"
        "// -----// IR Dump Before B //----- //\n"
        "call @mosaic_gpu_init_tma_desc(%a, %b, %c, %d, %e, %f, %10, %13) : ()\n"
    )
    assert descriptors(log) == (Descriptor(16, (4, 64), (64, 1), (2, 64), 128),)


@pytest.mark.slow
@pytest.mark.skipif(deviceless.refusal() is not None, reason=str(deviceless.refusal()))
@pytest.mark.parametrize("chip", kernels.ARCHITECTURES)
def test_every_kernel_keeps_the_laws(chip):
    rows = kernels.check(chip, interpret=False)
    assert {row["kernel"]: row["failures"] for row in rows if row["failures"]} == {}
