"""`longlive kernels check`: rows, failures, and the sources of its states."""

import ast
import json

import pytest

from longlive_jax.bench import kernels
from longlive_jax.cli.app import run
from longlive_jax.cli.kernels import state
from longlive_jax.planning import deviceless
from longlive_jax.spec import UserError
from pallas_kernels.catalog import catalog

GOOD = {
    "architecture": "sm_100a",
    "registers": 48,
    "spilled_bytes": 0,
    "shared_bytes": 1024,
    "tensor_columns": 0,
    "tensor_core": {},
    "instructions": {"F2FP.F16.E2M1.UNPACK_B": 16},
    "lacking": [],
}
NAME = "nvfp4_dequantize"


@pytest.fixture
def compiled(monkeypatch):
    """Replaces the compilers and the interpreter by a given report on one kernel."""
    monkeypatch.setattr(deviceless, "refusal", lambda: None)

    def returns(report, *, passes: bool | str = True):
        result = report if "failure" in report else {"compiled": [report]}
        monkeypatch.setattr(kernels, "compile_kernels", lambda *arguments: {NAME: result})
        monkeypatch.setattr(kernels, "run_interpreter_tests", lambda *arguments: {NAME: passes})

    return returns


def check(capsys, *options: str) -> tuple[int, dict]:
    code = run(["kernels", "check", "--chip=sm_100a", f"--kernel={NAME}", "--json", *options])
    (row,) = json.loads(capsys.readouterr().out)
    return code, row


def test_a_good_kernel(compiled, capsys):
    compiled(GOOD)
    code, row = check(capsys)
    assert code == 0 and row == {
        "kernel": NAME,
        "chip": "sm_100a",
        "instructions": GOOD["instructions"],
        "spill_bytes": 0,
        "registers": 48,
        "smem_bytes": 1024,
        "tensor_columns": 0,
        "register_pool": None,
        "registers_asked": None,
        **dict.fromkeys(kernels.CYCLES),
        "model_share": None,
        "interpreted": True,
        "not_run": None,
        "compiled": True,
        "executed_on": None,
        "failures": [],
    }
    code, row_without = check(capsys, "--no-interpret")
    assert code == 0 and row_without["interpreted"] is None
    assert row_without["not_run"] == "not requested"
    assert run(["kernels", "check", "--chip=sm_100a", f"--kernel={NAME}"]) == 0
    assert "interpreted" in capsys.readouterr().out
    assert state(row) == "interpreted, compiled for sm_100a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"failure": "ValueError: no"}, "ValueError: no"),
        ({"spilled_bytes": 24}, "24 bytes of registers spill"),
        ({"lacking": ["UTCHMMA"]}, "instructions it is written for are missing: UTCHMMA"),
        ({"shared_bytes": 300_000}, "300000 bytes of shared memory"),
        ({"tensor_columns": 513}, "513 columns of tensor memory"),
        ({"architecture": "sm_90a"}, "compiled for sm_90a"),
    ],
)
def test_failures_are_reported(compiled, capsys, change, message):
    compiled(change if "failure" in change else GOOD | change)
    code, row = check(capsys)
    assert code == 1 and row["failures"] == [message]


def test_wrong_results_in_the_interpreter_fail(compiled, capsys):
    compiled(GOOD, passes=False)
    code, row = check(capsys)
    assert code == 1 and row["failures"] == ["its test in the interpreter fails"]
    assert row["interpreted"] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["check", "--chip=sm_100"], "--chip: 'sm_100'; choose sm_100a or sm_90a"),
        (["chekc", "--chip=sm_100a"], "unknown command 'chekc'"),
        (
            ["check", "--chip=sm_90a", "--kernel=nvfp4_matmul"],
            "no kernel 'nvfp4_matmul' for sm_90a",
        ),
        (["check", "--chip=sm_100a", "--kernel=nvfp4_matmull"], "nvfp4_matmul"),
    ],
)
def test_bad_input(options, message, capsys, monkeypatch):
    monkeypatch.setattr(deviceless, "refusal", lambda: None)
    assert run(["kernels", *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) >= 1 and message in lines[-1]


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(deviceless, "tool", lambda name: None)
    with pytest.raises(UserError, match=r"no ptxas: install .*\[plan\]"):
        kernels.check("sm_100a")
    monkeypatch.setattr(deviceless, "tool", lambda name: "/somewhere")
    monkeypatch.setattr(deviceless, "PLUGIN", deviceless.PLUGIN / "nowhere")
    monkeypatch.setattr(deviceless.importlib.util, "find_spec", lambda name: None)
    assert (
        deviceless.refusal() == "no CUDA plugin of JAX: `pip install -e '.[plan]'` (no GPU needed)"
    )


def test_interpreted_is_the_result_of_the_tests(monkeypatch):
    tests = kernels.interpreter_tests()
    passed, failed = tests["nvfp4_quantize"], tests["nvfp4_dequantize"]
    lines = ["collecting", f"{failed} FAILED  [50%]", f"{passed} PASSED [100%]", "=== 1 failed"]
    monkeypatch.setattr(kernels, "process_lines", lambda command, folder, timeout: iter(lines))
    names = ["nvfp4_quantize", "nvfp4_dequantize", "nvfp4_matmul_2cta"]
    results = kernels.run_interpreter_tests(names, lambda done, total: None)
    assert [results[name] for name in names[:2]] == [True, False]
    assert str(results[names[2]]).startswith("the interpreter cannot run it: ")


def run_two(monkeypatch, lines=()):
    monkeypatch.setattr(kernels, "process_lines", lambda command, folder, timeout: iter(lines))
    names = ["nvfp4_quantize", "nvfp4_dequantize"]
    return kernels.run_interpreter_tests(names, lambda done, total: None)


def test_what_does_not_run_is_no_failure(monkeypatch, compiled, capsys):
    tests = kernels.interpreter_tests()
    errors = [f"{tests['nvfp4_quantize']} ERROR [100%]", f"ERROR {tests['nvfp4_dequantize']}"]
    assert run_two(monkeypatch, errors) == {
        "nvfp4_quantize": "pytest: error",
        "nvfp4_dequantize": "pytest could not collect it",
    }
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "ROOT", kernels.ROOT / "nowhere")
        assert set(run_two(patch).values()) == {"the tests are not part of this installation"}
    with monkeypatch.context() as patch:
        patch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
        assert set(run_two(patch).values()) == {"pytest is not installed"}
    compiled(GOOD, passes="pytest is not installed")
    code, row = check(capsys)
    assert code == 0 and row["failures"] == []
    assert (row["interpreted"], row["not_run"]) == (None, "pytest is not installed")
    assert run(["kernels", "check", "--chip=sm_100a", f"--kernel={NAME}"]) == 0
    assert "not interpreted: pytest is not installed" in capsys.readouterr().out


def test_all_interpreter_tests_exist():
    tests = kernels.interpreter_tests()
    assert tests.keys() <= catalog().keys() and len(tests) > 10
    file, _, function = kernels.TEST.partition("::")
    tree = ast.parse((kernels.ROOT / file).read_text())
    assert function in [x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]


def test_runs_are_read_from_recorded_results(tmp_path):
    assert kernels.executed_on(NAME, "sm_100a", tmp_path) is None
    rows = [{"kernel": NAME, "chip": "sm_100a", "executed_on": "NVIDIA GB200"}]
    (tmp_path / "kernels_gb200.json").write_text(json.dumps(rows))
    assert kernels.executed_on(NAME, "sm_100a", tmp_path) == "NVIDIA GB200"
    assert kernels.executed_on(NAME, "sm_90a", tmp_path) is None


@pytest.mark.skipif(deviceless.refusal() is not None, reason=f"{deviceless.refusal()}")
@pytest.mark.parametrize(
    "names",
    [
        ["nvfp4_quantize_static", "nvfp4_dequantize"],
        pytest.param(None, marks=pytest.mark.slow),
    ],
)
def test_nvfp4_kernels_compile_onto_hardware_conversions_without_spills(names):
    for row in kernels.check("sm_100a", names, interpret=False):
        assert row["failures"] == [] and row["compiled"], row
        if row["kernel"].startswith(("nvfp4_quantize", "nvfp4_dequantize")):
            assert sum(n for name, n in row["instructions"].items() if ".E2M1." in name) >= 8, row
