"""`longlive kernels prove` on a fake device: every way in which a kernel or a device can end."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from longlive_jax.bench import prove, prove_kernel, prove_report
from longlive_jax.bench.prove import Device, Step
from longlive_jax.bench.prove_report import Report
from longlive_jax.cli.app import run
from longlive_jax.planning.chips import CHIPS
from longlive_jax.spec import Failure, UserError
from pallas_kernels import dispatch, tuned
from pallas_kernels.catalog import catalog
from pallas_kernels.digest import source_digest
from pallas_kernels.kernel import Case, Cost, Kernel

FAKE = Path(__file__).with_name("fake_kernel.py")
KIND = "NVIDIA H200"
DIGEST = source_digest(catalog()["attention_forward_hopper"].modules)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Results, proofs and tile sizes go to a temporary folder."""
    monkeypatch.setattr(tuned, "PROVEN", tmp_path / "proven")
    monkeypatch.setattr(tuned, "TUNED", tmp_path / "tuned")
    monkeypatch.setattr(prove_report, "RESULTS", tmp_path / "results")
    tuned.forget()
    yield tmp_path
    tuned.forget()


def fake_device(folder: Path, behaviours: dict[str, str], laws=()) -> Device:
    """A device whose kernels behave as their names say."""

    def command(name: str, tune: bool) -> list[str]:
        return [sys.executable, str(FAKE), name, behaviours[name], str(folder), DIGEST]

    return Device(
        KIND,
        "sm_90a",
        command,
        lambda: not (folder / "gone").exists(),
        lambda name, timeout: list(laws),
    )


def run_all(folder: Path, behaviours: dict[str, str], timeout=20.0, **options):
    """(exit code, kernel -> row of the report, what was said)."""
    report = Report(KIND, "sm_90a")
    report.check_writable()
    steps = [Step(name, 1.0, timeout) for name in behaviours]
    messages: list[str] = []
    device = fake_device(folder, behaviours, **options)
    code = prove.prove(device, steps, report, tune=False, say=messages.append)
    rows = json.loads(report.path.read_text())
    return code, {row["kernel"]: row for row in rows}, messages


def test_every_end_of_a_kernel_is_recorded_and_the_rest_goes_on(folders):
    ends = ("crash", "wrong", "unequal", "slow", "good")
    code, rows, messages = run_all(folders, {name: name for name in ends})
    assert code == 1 and [rows[name]["state"] for name in ends] == [
        "crashed", "failed", "failed", "proven", "proven",
    ]  # fmt: skip
    assert "in its canaries: CUDA_ERROR_ILLEGAL_ADDRESS" in rows["crash"]["failure"]
    assert rows["wrong"]["failure"].startswith("production: 3.0e-01 from the oracle")
    assert rows["unequal"]["failure"] == "run 7 of 20 on the same input gave other bits"
    # tokamax is faster than both, but "auto" cannot take it.
    assert rows["good"]["faster"] and not rows["slow"]["faster"]
    assert rows["good"]["executed_on"] == KIND and rows["wrong"]["executed_on"] is None
    assert rows["good"]["equal_runs"] == 20 and rows["good"]["share"] == 0.5
    assert messages[-1] == (
        "good: proven, 1000 us, 50 % of the limit; cudnn 2000 us, tokamax 100 us; auto takes it"
    )
    assert "auto does not take it" in messages[3]


def test_a_hang_is_killed_with_all_its_processes(folders):
    begin = time.monotonic()
    code, rows, _ = run_all(folders, {"hang": "hang", "good": "good"}, timeout=2.0)
    assert code == 1 and time.monotonic() - begin < 15
    assert rows["hang"]["state"] == "hung"
    assert rows["hang"]["failure"].startswith("it hung in its canaries and was killed after ")
    child = int((folders / "child").read_text())
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text()
    assert rows["good"]["state"] == "proven"


def test_a_device_that_disappears_leaves_what_ran_before(folders):
    code, rows, messages = run_all(folders, {"good": "good", "vanish": "vanish", "late": "good"})
    assert code == 1 and rows["good"]["state"] == "proven"
    assert rows["vanish"]["state"] == "crashed"
    assert rows["vanish"]["failure"].endswith("the device does not answer any more")
    assert rows["late"]["state"] == "not run" and not (folders / "late").exists()
    assert rows["late"]["failure"] == "the device does not answer any more"
    assert len(messages) == 2


def test_laws_that_take_all_the_time_start_nothing(folders):
    device = fake_device(folders, {"good": "good"})
    slow = dataclasses.replace(device, laws=lambda name, timeout: time.sleep(timeout) or [])
    findings = prove.run_kernel(slow, "good", 0.01, tune=False)
    assert findings["end"] == "laws" and findings["failure"] == "checking them took all of 0 s"


def test_broken_laws_start_nothing(folders):
    code, rows, _ = run_all(folders, {"good": "good"}, laws=["65536 registers of 64512"])
    assert code == 1 and rows["good"]["state"] == "failed"
    assert rows["good"]["failure"] == "static laws: 65536 registers of 64512"
    assert not (folders / "good").exists()


def test_unused_seconds_go_to_later_kernels(folders, monkeypatch):
    given = []

    def run_kernel(device, name, timeout, *, tune):
        given.append(timeout)
        return {"end": "hung", "after": timeout}

    monkeypatch.setattr(prove, "run_kernel", run_kernel)
    run_all(folders, {"a": "", "b": "", "c": ""}, timeout=5.0)
    assert given == pytest.approx([5, 10, 15], abs=0.5)


def test_an_interruption_leaves_the_report_and_exits_130(folders):
    """Ctrl-C while the second kernel runs, in a process of its own."""
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from tests.longlive_jax.bench import test_prove as t
from longlive_jax.bench import prove, prove_report
from longlive_jax.cli import app, prove as cli
from pallas_kernels import tuned
folder = Path({str(folders)!r})
tuned.PROVEN, tuned.TUNED = folder / "proven", folder / "tuned"
prove_report.RESULTS = folder / "results"
prove.find_device = lambda: t.fake_device(folder, {{"good": "good", "hang": "hang"}})
prove.plan = lambda *arguments, tune: [prove.Step(n, 1.0, 60.0) for n in ("good", "hang")]
raise SystemExit(app.run(["kernels", "prove"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    stop = time.monotonic() + 60
    while not (folders / "child").exists() and time.monotonic() < stop:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "interrupted" in errors and "report in" in errors
    rows = json.loads((folders / "results" / "kernels_nvidia_h200.json").read_text())
    assert [row["state"] for row in rows] == ["proven", "interrupted"]
    child = int((folders / "child").read_text())
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text()


@pytest.fixture
def on_h200(monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    monkeypatch.setattr(dispatch, "capability", lambda: "9.0")
    monkeypatch.setattr(dispatch, "device_kind", lambda: KIND)


X = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)


def written(**change) -> None:
    """Proofs of both Hopper kernels, the forward kernel's with a change."""
    rows = {}
    for name in ("attention_forward_hopper", "attention_gradients_hopper"):
        digest = source_digest(catalog()[name].modules)
        good = {"device": KIND, "digest": digest, "tiles": {}, "proven": True, "faster": True}
        rows[name] = good | (change if "forward" in name else {})
    path = tuned.PROVEN / tuned.file_name(KIND)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows))
    tuned.forget()


def test_auto_takes_a_kernel_only_where_it_is_proven_and_faster(on_h200, monkeypatch):
    assert not dispatch.proven("attention", X)
    written()
    assert dispatch.proven("attention", X)
    assert not dispatch.proven("attention", jax.ShapeDtypeStruct(X.shape, jnp.float32))
    for change in (
        {"faster": False}, {"proven": False}, {"digest": "older"}, {"tiles": {"keys": 64}},
        {"device": "NVIDIA H100"},
    ):  # fmt: skip
        written(**change)
        assert not dispatch.proven("attention", X), change
    written()
    monkeypatch.setattr(dispatch, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    assert not dispatch.proven("attention", X)


def test_no_environment_variable_overrules_a_missing_proof(on_h200, monkeypatch):
    for name in ("LONGLIVE_KERNELS", "LONGLIVE_IMPLEMENTATION", "PALLAS_KERNELS", "JAX_PROVEN"):
        monkeypatch.setenv(name, "1")
    assert not dispatch.proven("attention", X)


def test_a_slow_kernel_is_proven_and_not_taken(folders, on_h200):
    both = ("attention_forward_hopper", "attention_gradients_hopper")
    run_all(folders, {both[0]: "slow", both[1]: "good"})
    assert not dispatch.is_proven(catalog()[both[0]], KIND)
    run_all(folders, {both[0]: "good"})
    assert dispatch.is_proven(catalog()[both[0]], KIND)
    # The fake reports the digest of the forward kernel for both.
    assert not dispatch.is_proven(catalog()[both[1]], KIND)


def test_tile_sizes_are_kept_where_they_are_proven(folders):
    report = Report(KIND, "sm_90a", tune=True)
    report.check_writable()
    report.rows = [
        {"kernel": "a", "state": "proven", "tiles": {"keys": 64}, "proven": True, "faster": True},
        {"kernel": "b", "state": "failed", "tiles": {"keys": 32}, "proven": False, "faster": False},
    ]
    report.write()
    assert tuned.tiles("a", KIND) == {"keys": 64} and tuned.tiles("b", KIND) == {}
    assert tuned.tiles("a", "NVIDIA H100") == {}


def test_tuned_tiles_reach_the_attention_kernels(monkeypatch):
    from pallas_kernels.attention.mosaic import op
    from pallas_kernels.attention.mosaic.targets import HOPPER

    findings = {"attention_forward_hopper": {"stages": 3}}
    monkeypatch.setattr(tuned, "tiles", lambda name, device: findings.get(name, {}))
    target = op.with_tuned_tiles(HOPPER, KIND)
    assert target.forward_tiles == dataclasses.replace(HOPPER.forward_tiles, stages=3)
    assert target.backward_tiles == HOPPER.backward_tiles


def test_the_plan_fits_ten_minutes_on_every_chip(capsys):
    for chip, device in (("sm_90a", KIND), ("sm_100a", "NVIDIA GB200")):
        steps = prove.plan(chip, device, None, tune=False)
        assert {x.kernel for x in steps} == {k for k, x in catalog().items() if chip in x.chips}
        assert sum(step.timeout for step in steps) + prove.QUERY <= 600.5
        assert all(step.timeout >= 1.4 * step.modelled for step in steps)
    assert run(["kernels", "prove", "--dry-run", "--chip=sm_90a"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("NVIDIA H200 (sm_90a): 2 kernels") and "at most" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dry-run", "--chip=sm_90"], "--chip: unknown chip 'sm_90'; did you mean 'sm_90a'?"),
        (["--chip=sm_90a"], "--chip is for --dry-run"),
        (["--dry-run", "--chip=sm_90a", "--kernel=nvfp4_matmul"], "no kernel 'nvfp4_matmul'"),
        (["--out=."], "--out: . is a folder; name a file"),
        (["--tine"], "unknown option '--tine'; did you mean '--tune'?"),
    ],
)
def test_wrong_arguments_give_one_line(options, message, capsys):
    assert run(["kernels", "prove", *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_without_a_gpu_it_names_the_check(monkeypatch, capsys):
    report = {"device": "cpu", "capability": "", "platform": "cpu"}
    monkeypatch.setattr(prove, "_lines", lambda command, timeout: iter([report]))
    assert run(["kernels", "prove"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "it needs an NVIDIA GPU and there is none; `longlive kernels check`" in line


def test_a_device_that_does_not_answer_is_a_failure(monkeypatch):
    monkeypatch.setattr(prove, "_lines", lambda command, timeout: iter([{"end": "hung"}]))
    with pytest.raises(Failure, match="the GPU does not answer"):
        prove.find_device()


def test_a_gpu_without_kernels_is_refused(monkeypatch):
    report = {"device": "NVIDIA A100", "capability": "8.0", "platform": "gpu"}
    monkeypatch.setattr(prove, "_lines", lambda command, timeout: iter([report]))
    with pytest.raises(UserError, match=r"no kernels for NVIDIA A100 .compute capability 8.0."):
        prove.find_device()


def test_a_report_that_cannot_be_written_is_refused_first(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="kernels prove: "):
        Report(KIND, "sm_90a", out=file / "report.json").check_writable()


def double(x, *, interpret=None, factor=2):
    return factor * x


def fake_record(run=double, **change) -> Kernel:
    def build() -> tuple:
        return (jnp.arange(8.0),)

    settings = {
        "name": "fake", "op": "fake", "chips": ("sm_90a",), "build": lambda: (double, build()),
        "refusal": lambda *arguments: None, "run": run, "oracle": lambda x: x + x,
        "cases": (Case("one tile", build), Case("no keys", build), Case("odd", build)),
        "tiles": {}, "cost": lambda x: Cost(8 * x.size, 4 * x.size), "instructions": ("FADD",),
        "production": build, "modules": ("kernel",),
    }  # fmt: skip
    return Kernel(**settings | change)


def proved(kernel: Kernel, **options) -> dict:
    findings: dict = {}
    prove_kernel.prove_kernel(kernel, findings.update, **options)
    return findings


def test_a_process_runs_all_phases():
    findings = proved(fake_record())
    assert findings["canaries"] == ["one tile", "no keys"] and findings["error"] == 0
    assert findings["equal_runs"] == 20 and findings["seconds"] > 0 and findings["proven"]
    assert prove_report.verdict(findings | {"end": "ended"})["state"] == "proven"
    nothing_timed = findings | {"end": "ended", "automatic": []}
    assert not prove_report.verdict(nothing_timed)["faster"]


def test_wrong_numbers_and_unequal_bits_stop_a_process(monkeypatch):
    with pytest.raises(prove_kernel.Wrong, match=r"one tile: 5.0e-01 from the oracle"):
        proved(fake_record(lambda x, *, interpret=None: 3 * x))
    with pytest.raises(prove_kernel.Wrong, match="inf from the oracle"):
        proved(fake_record(lambda x, *, interpret=None: x / 0))
    results = iter(jnp.full(2, i // 3) for i in range(9))
    with pytest.raises(prove_kernel.Wrong, match="run 4 of 20 on the same input gave other bits"):
        prove_kernel.equal_runs(lambda: next(results))


def test_the_search_keeps_the_fastest_right_tiles(monkeypatch):
    seconds = iter([4.0, 3.0, 1.0])
    monkeypatch.setattr(prove_kernel, "timed", lambda run: next(seconds))
    kernel = fake_record(tiles={"factor": (2, 3, 2.0)})
    arguments = kernel.production()
    best, tried = prove_kernel.search(kernel, arguments, kernel.oracle(*arguments), {})
    assert best == {"factor": 2.0} and [x.get("seconds") for x in tried] == [3.0, None, 1.0]


def test_the_limit_is_that_of_memory_products_or_exponentials():
    chip = CHIPS["h200"]
    assert prove_kernel.chip_of("NVIDIA H200") is chip
    assert prove_kernel.chip_of("NVIDIA L4") is None
    for cost, seconds in (
        (Cost(4_800_000_000), 1e-3),
        (Cost(0, flops=989_000_000_000), 1e-3),
        (Cost(0, flops=989_000_000_000, flops_format="nvfp4"), 2.5e-4),
        (Cost(0, exponentials=16 * 132 * 1_980_000), 1e-3),
    ):
        assert prove_kernel.limit(cost, chip) == pytest.approx(seconds)
