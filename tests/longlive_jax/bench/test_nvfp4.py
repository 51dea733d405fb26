"""The benchmark of packed operations: its work counts, its report, and its checks."""

import json

import jax
import pytest

from longlive_jax.bench import nvfp4 as bench
from longlive_jax.cli.app import run

TINY = [
    "--rows=32", "--inputs=32", "--outputs=48", "--slots=1", "--tokens=8", "--heads=1",
    "--width=16", "--calls=2", "--repeats=1", "--product=32", "--copy=1",
]  # fmt: skip


def test_report_as_json_and_as_a_table(tmp_path, capsys):
    out = tmp_path / "new" / "nvfp4.json"
    assert run(["bench", "nvfp4", *TINY, "--json", f"--out={out}"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(out.read_text())
    assert list(report["operations"]) == list(bench.OPERATIONS)
    assert report["machine"]["jax"] == jax.__version__
    for name, operation in report["operations"].items():
        for way, row in operation["ways"].items():
            share = row["per_second"] / report["limits"][operation["unit"]]
            assert row["share_of_limit"] == pytest.approx(share, rel=0.01, abs=1e-4), (name, way)
    assert set(report["operations"]["linear"]["ways"]) == {"bfloat16", "fp8", "nvfp4"}
    assert report["operations"]["matmul"]["ways"]["reference"]["times_reference"] == 1
    if jax.default_backend() == "cpu":
        assert "needs Blackwell" in report["not_run"]["matmul/mosaic"]
    from longlive_jax.cli.bench_tables import show_nvfp4

    show_nvfp4(report)
    text = capsys.readouterr().out
    assert "quantize" in text and "of limit" in text and "not run" in text


def test_useful_work_counts_each_byte_and_operation_once():
    spec = bench.NVFP4Spec(rows=32, inputs=32, outputs=48, slots=1, tokens=8, heads=1, width=16)
    work = {name: make(spec).work for name, make in bench.OPERATIONS.items()}
    assert work == {
        "quantize": 32 * 32 * (2 + 0.5625),
        "dequantize": 48 * 32 * (2 + 0.5625),
        "matmul": 2 * 32 * 32 * 48,
        "linear": 2 * 32 * 32 * 48,
        "kv_dequantize": 8 * 16 * (2 + 0.5625),
        "kv_attention": 4 * 8 * 16 * 16,
    }


@pytest.mark.parametrize("settings", [{"rows": 0}, {"inputs": 40}, {"width": 24}])
def test_invalid_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        bench.NVFP4Spec(**settings)
