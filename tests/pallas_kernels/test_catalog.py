"""A record is all that a new kernel needs: check, dispatch, bench, prove and docs see it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from longlive_jax.bench import kernel_times, kernels, prove
from longlive_jax.bench.kernel_times import KernelTimesSpec, bench_kernels, work_table
from longlive_jax.cli.app import run
from longlive_jax.planning import deviceless
from pallas_kernels import catalog as catalogs
from pallas_kernels import dispatch, tuned
from pallas_kernels.catalog import catalog, kernels_of
from pallas_kernels.digest import source_digest
from pallas_kernels.kernel import Case, Cost, Kernel, abstract, bind, error
from pallas_kernels.nvfp4 import dequantize, quantize, select_implementation
from pallas_kernels.nvfp4.format import NVFP4, dequantize_reference
from pallas_kernels.nvfp4.mosaic import records
from pallas_kernels.tokens import make
from tests.pallas_kernels.test_records import failures

PACKED = quantize(jnp.ones((2, 32)), implementation="reference")
LAUNCHED = jnp.zeros(())
FAKE = Kernel(
    "nvfp4_dequantize_hopper",
    op="dequantize",
    chips=("sm_90a",),
    build=lambda: (dequantize_reference, (PACKED,)),
    refusal=lambda a, *rest, **options: "too small" if a.size < 64 else None,
    run=lambda a, *, interpret=None: dequantize_reference(a, jnp.bfloat16),
    oracle=lambda a: dequantize_reference(a, jnp.bfloat16),
    cases=(Case("one tile", lambda: (PACKED,)),),
    tiles={"rows": (1, 2)},
    cost=lambda a: Cost(2 * a.size),
    instructions=("F2FP",),
    production=lambda: (PACKED,),
    modules=("nvfp4.format",),
    launches=0,
    launch=lambda a, dtype, offset: LAUNCHED,
)


@pytest.fixture
def with_fake(monkeypatch):
    """The record of a kernel for Hopper, added to its family's records; nothing else changes."""
    monkeypatch.setattr(records, "KERNELS", (*records.KERNELS, FAKE))
    catalog.cache_clear()
    yield FAKE.name
    monkeypatch.undo()
    catalog.cache_clear()


def on(monkeypatch, capability: str, kind: str = "NVIDIA H200") -> None:
    from pallas_kernels.nvfp4 import api

    for module in (dispatch, api, kernel_times):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
        monkeypatch.setattr(module, "capability", lambda: capability)
    monkeypatch.setattr(dispatch, "device_kind", lambda: kind)
    monkeypatch.setattr(kernel_times, "device_kind", lambda: kind)


def test_check_and_the_test_body_see_it(with_fake, monkeypatch):
    monkeypatch.setattr(deviceless, "refusal", lambda: None)
    compiled: list[str] = []

    def compile_kernels(target, names, tick, timeout):
        compiled.extend(names)
        return {name: {"failure": "no compiler here"} for name in names}

    monkeypatch.setattr(kernels, "compile_kernels", compile_kernels)
    rows = kernels.check("sm_90a", interpret=False)
    assert with_fake in compiled and with_fake in [row["kernel"] for row in rows]
    assert kernels.interpreter_tests()[with_fake].endswith(f"[{with_fake}]")
    assert failures(catalog()[with_fake], slow=False) == []


def test_dispatch_sees_it(with_fake, monkeypatch, tmp_path):
    on(monkeypatch, "9.0")
    assert [x.name for x in kernels_of("dequantize", "9.0")] == [with_fake]
    assert select_implementation("dequantize", PACKED, implementation="mosaic") == "mosaic"
    assert dispatch.kernel_refusal("dequantize", "9.0", PACKED) is None
    assert dispatch.kernel_refusal("dequantize", "9.0", PACKED.codes[:1, :16]) == "too small"
    assert dispatch.chips_of("dequantize") == "Blackwell (sm_100) and Hopper (sm_90)"
    # "auto" takes it once it is proven and faster.
    monkeypatch.setattr(tuned, "PROVEN", tmp_path)
    assert select_implementation("dequantize", PACKED) == "xla"
    proof = {"device": "NVIDIA H200", "digest": source_digest(FAKE.modules), "tiles": {}}
    path = tmp_path / tuned.file_name("NVIDIA H200")
    path.write_text(json.dumps({with_fake: proof | {"proven": True, "faster": True}}))
    tuned.forget()
    assert select_implementation("dequantize", PACKED) == "mosaic"
    assert dequantize(PACKED) is LAUNCHED
    tuned.forget()


def test_bench_sees_it(with_fake, monkeypatch):
    on(monkeypatch, "9.0")
    report = bench_kernels(KernelTimesSpec(kernel=with_fake))
    times = report["kernels"][with_fake]
    assert times["seconds"] > 0 and times["peers"]["xla"] > 0 and times["limit_seconds"] > 0
    on(monkeypatch, "10.0", "NVIDIA GB200")
    report = bench_kernels(KernelTimesSpec(kernel=with_fake))
    assert report["not_run"] == {with_fake: "it is for sm_90a, this is sm_100a"}


def test_prove_sees_it(with_fake, capsys):
    (step,) = prove.plan("sm_90a", "NVIDIA H200", [with_fake], tune=True)
    assert step.kernel == with_fake
    assert run(["kernels", "prove", "--dry-run", "--chip=sm_90a"]) == 0
    assert with_fake in capsys.readouterr().out


def test_the_docs_table_sees_it(with_fake):
    assert f"| `{with_fake}` | dequantize | sm_90a | 0.0 |" in work_table()


def test_the_docs_have_the_table_of_all_records():
    page = Path(kernels.ROOT / "docs" / "kernels.md").read_text()
    assert work_table() in page


def test_names_are_unique(monkeypatch):
    monkeypatch.setattr(records, "KERNELS", (*records.KERNELS, records.KERNELS[0]))
    catalog.cache_clear()
    with pytest.raises(ValueError, match="two kernels are named 'nvfp4_quantize'"):
        catalog()
    monkeypatch.undo()
    catalog.cache_clear()


def test_a_digest_follows_imports_and_only_those(tmp_path, monkeypatch):
    from pallas_kernels import digest

    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.py").write_text("import jax\n")
    (tmp_path / "a.py").write_text("from pallas_kernels.b import x\n")
    monkeypatch.setattr(digest, "ROOT", tmp_path)

    def now() -> str:
        source_digest.cache_clear()
        return source_digest(("a",))

    first = now()
    (tmp_path / "c.py").write_text("import numpy\n")
    assert now() == first
    (tmp_path / "b.py").write_text("import numpy\n")
    assert now() != first
    source_digest.cache_clear()


def test_tokens_are_fixed_and_arrays_are_arguments():
    tokens = make(jnp.zeros((4, 3)), 0, False)

    def run(x, tokens, missing, *, interpret=None):
        return x + tokens.chunk_index + (missing is None)

    call, arrays = bind(run, (jnp.ones(4), tokens, None))
    assert len(arrays) == 1 and float(call(*arrays)[0]) == 2
    shapes = abstract(lambda: (jnp.ones(4), make(tokens.pos, 0, False), None))
    assert shapes[0] == jax.ShapeDtypeStruct((4,), jnp.float32) and shapes[2] is None


def test_the_error_is_relative_and_counts_what_only_one_has():
    x = jnp.array([3.0, jnp.nan, jnp.inf, 4.0])
    assert error(x, x) == 0 and error(2 * x, x) == pytest.approx(1.0)
    assert error(x, jnp.nan_to_num(x)) == float("inf")
    assert error((x, x[:2]), (x, x)) == float("inf")
    array = NVFP4(PACKED.codes, PACKED.scales, 2 * PACKED.amax, PACKED.rule)
    assert error(array, PACKED) == pytest.approx(1.0)
    assert float(dequantize(array, implementation="reference")[0, 0]) == 2
    assert catalogs.catalog() is catalog()
