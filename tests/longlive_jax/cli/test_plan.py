"""`longlive plan`: a plan for GPUs that are not here, and mistakes that compile nothing."""

import json

import pytest
from flax import nnx

from longlive_jax.cli.app import run
from longlive_jax.io.checkpoint import save_component
from longlive_jax.models.params import params_of
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.planning import compile as plan_compile

CONFIG = "--config=configs/ar_5b.py"
NAMED = {
    "chip", "devices", "mesh", "latent_frames", "remat", "peak_bytes_per_device", "device_bytes",
    "fits", "flops_per_step", "collective_bytes_per_step",
}  # fmt: skip
TINY = DiTConfig(
    dim=24, ffn_dim=32, freq_dim=8, text_dim=8, text_len=6, heads=2, layers=2, in_channels=4,
    out_channels=4,
)  # fmt: skip


@pytest.mark.skipif(plan_compile.refusal() is not None, reason="no CUDA plugin to compile with")
def test_a_plan_of_a_checkpoint_compiled_for_two_gpus(tmp_path, capsys):
    """The model is the checkpoint's. In each of its two layers q, k, v and output are exchanged
    forward, once more when the layer is recomputed, and as gradients, 16 bits a number."""
    folder = tmp_path / "tiny"
    save_component(folder, "dit", params_of(DiT(TINY, rngs=nnx.Rngs(0))), TINY)
    words = [f"--config.checkpoint={folder}", "--mesh=sp=2", "--chip=gb200", "--json"]
    words += ["--frames=8", "--chunk=2", "--size=4x6x4", "--config.recycling=none"]
    assert run(["plan", CONFIG, *words, "--config.ffn_parts=1"]) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert set(report) >= NAMED and "Compiling" in said.err
    assert report["model"] == str(folder) and report["parameters"] < 1e5
    assert report["mesh"] == {"data": 1, "fsdp": 1, "sp": 2} and report["devices"] == 2
    assert report["batch"] == 1 and report["fits"] is True
    assert report["temporary_bytes_per_device"] < report["peak_bytes_per_device"] < 2**30
    kinds = report["collectives_per_device"]
    tokens = 2 * 8 * 2 * 3
    assert kinds["all-to-all"] == {"count": 24, "bytes": 24 * tokens // 2 * 24 * 2 / 2}
    assert kinds["reduce-scatter"]["count"] and kinds["all-gather"]["count"]
    sent = sum(kind["bytes"] for kind in kinds.values())
    assert report["collective_bytes_per_step"] == 2 * sent


def test_a_table_without_a_compiler(capsys, monkeypatch):
    """Without a checkpoint the model is the 5B, and the plan says so."""
    monkeypatch.setattr(plan_compile, "compiled", None)
    assert run(["plan", f"{CONFIG}:16s", "--chip=h200", "--no-compile"]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    found = dict(row for row in rows if len(row) == 2)
    assert found["devices"] == "8 x NVIDIA H200, data 2, fsdp 1, sp 4"
    assert found["model"].startswith("Wan2.2-TI2V-5B (there is no checkpoints/wan22_5b), 5.00 B")
    assert found["clips"].startswith("2 of 96 x 44x80x48 (16 s) in chunks of 8, 337,920 tokens")
    assert found["clips"].endswith("(a chunk a row of the error buffers: there is no clips/16s)")
    assert found["peak"].startswith("not compiled; a program may have 137.0 GiB of 141.0")


def test_a_verdict_in_words(capsys, monkeypatch):
    none = {"count": 0, "bytes": 0.0}
    found = {"peak": 2**37, "temporary": 1, "seconds": {}, "collectives": {"all-to-all": none}}
    monkeypatch.setattr(plan_compile, "refusal", lambda: None)
    monkeypatch.setattr(plan_compile, "compiled", lambda job: found)
    assert run(["plan", CONFIG, "--chip=h100"]) == 0
    assert "128.0 GiB a device: does not fit by 52.9 GiB" in capsys.readouterr().out
    assert run(["plan", CONFIG, "--chip=gb200"]) == 0
    assert "128.0 GiB a device: fits, 52.3 GiB to spare" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--chip=gb20", "unknown chip 'gb20'; did you mean 'gb200'?"),
        ("--chip=h200 --mesh=data=8,tp=4", "--mesh: unknown axis 'tp'"),
        ("--chip=h200 --mesh=sp=four", "--mesh: expected sp=NUMBER, got 'sp=four'"),
        ("--chip=h200 --mesh=sp=0", "mesh.sp is 0; give at least 1"),
        ("--chip=h200 --mesh=sp=5", "24 attention heads do not split over mesh.sp = 5"),
        ("--chip=h200 --mesh=sp=8 --frames=96", "12 chunks of a sequence do not split over"),
        ("--chip=h200 --mesh=sp=3", "an axis of 14336 does not split into 3"),
        ("--chip=h200 --frames=100", "are no whole number of chunks of 8; choose 96"),
        ("--chip=h200 --size=44x80", "size: expected 3 values, got 2"),
        ("--chip=h200 --size=44xx48", "--size: expected numbers and 'x', got '44xx48'"),
        ("--chip=h200 --size=45x80x48", "height and width must be even"),
        ("--chip=h200 --size=44x80x16", "latents of 16 channels for a model of 48"),
        ("--chip=h200 --config.ffn_parts=7", "ffn_parts = 7 does not divide the 168960"),
        ("--chip=h200 --config.batch=9", "config.batch = 9 does not split over"),
        ("--chip=h200 --config.loop.accumulate=3", "does not split into loop.accumulate"),
        ("--chip=h200 --config.stage=vae", "config.stage is 'vae'; plans are made for 'clips'"),
        ("--chip=h200 --frame=8", "unknown option '--frame'; did you mean '--frames'?"),
        ("--mesh=sp=4", "--chip"),
    ],
)
def test_mistakes_are_told_before_anything_is_compiled(capsys, monkeypatch, words, message):
    monkeypatch.setattr(plan_compile, "refusal", lambda: None)
    monkeypatch.setattr(plan_compile, "compiled", None)
    assert run(["plan", CONFIG, *words.split()]) == 2
    said = capsys.readouterr()
    assert message in said.err and not said.out


def test_a_missing_compiler_names_the_extra(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(plan_compile, "_plugin", lambda: None)
    monkeypatch.setattr(plan_compile, "BESIDE", tmp_path)
    assert run(["plan", CONFIG, "--chip=h200"]) == 2
    said = capsys.readouterr().err
    assert "pip install -e '.[plan]'" in said and "--no-compile" in said


@pytest.mark.skipif(plan_compile.refusal() is not None, reason="no CUDA plugin to compile with")
def test_a_step_that_cannot_be_compiled_says_why(tmp_path, capsys):
    """The kernels take no heads of 12; nothing is compiled, the step cannot even be traced."""
    folder = tmp_path / "tiny"
    save_component(folder, "dit", params_of(DiT(TINY, rngs=nnx.Rngs(0))), TINY)
    words = [f"--config.checkpoint={folder}", "--mesh=sp=2", "--chip=h200", "--size=4x6x4"]
    words += ["--frames=16", "--config.attention=mosaic"]
    assert run(["plan", CONFIG, *words]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "could not be compiled: Unsupported: mosaic attention" in last and "12 wide" in last
