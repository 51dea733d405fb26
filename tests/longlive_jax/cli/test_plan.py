"""`longlive plan`: estimates for GPUs that are not present, and mistakes that compile nothing."""

import importlib.util
import json
import re

import pytest
from flax import nnx

from longlive_jax.cli.app import run
from longlive_jax.io.checkpoint import save_component
from longlive_jax.models.params import params_of
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.planning import compile as plan_compile

CONFIG = "--config=configs/ar_5b.py"
PROMISED_KEYS = {
    "chip", "devices", "mesh", "latent_frames", "remat", "peak_bytes_per_device", "device_bytes",
    "fits", "flops_per_step", "collective_bytes_per_step",
}  # fmt: skip
TINY = DiTConfig(
    dim=24, ffn_dim=32, freq_dim=8, text_dim=8, text_len=6, heads=2, layers=2, in_channels=4,
    out_channels=4,
)  # fmt: skip


@pytest.mark.skipif(plan_compile.refusal() is not None, reason="no CUDA plugin to compile with")
def test_a_checkpoint_compiled_for_two_gpus(tmp_path, capsys):
    """The model is the checkpoint's. Each of its two layers exchanges q, k, v and output in the
    forward pass, in its recomputation, and as gradients, in 16 bits."""
    folder = tmp_path / "tiny"
    save_component(folder, "dit", params_of(DiT(TINY, rngs=nnx.Rngs(0))), TINY)
    words = [f"--config.checkpoint={folder}", "--mesh=sp=2", "--chip=gb200", "--json"]
    words += ["--frames=8", "--chunk=2", "--size=4x6x4", "--config.recycling=none"]
    assert run(["plan", CONFIG, *words, "--config.ffn_chunks=1"]) == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert set(report) >= PROMISED_KEYS and "Compiling" in output.err
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


def test_table_without_a_compiler(capsys, monkeypatch):
    """Without a checkpoint the model is the 5B, and the table names it."""
    monkeypatch.setattr(plan_compile, "compile_step", None)
    assert run(["plan", f"{CONFIG}:16s", "--chip=h200", "--no-compile"]) == 0
    rows = (re.split(r" {2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    table = dict(row for row in rows if len(row) == 2)
    assert table["devices"] == "8 x NVIDIA H200, data 2, fsdp 1, sp 4"
    assert table["model"].startswith("Wan2.2-TI2V-5B (no checkpoint at checkpoints/wan22_5b), 5.00")
    clips = "2 clips of 96 x 44x80x48 (16 s) in chunks of 8, 337,920 tokens"
    origin = "(one chunk per row of the error buffers: no clips at clips/16s)"
    assert table["batch"] == f"{clips} {origin}"
    assert re.search(r"per device: parameters [\d.]+, EMA [\d.]+, ", table["train state"])
    assert table["communication"] == "not compiled"
    assert table["peak memory"] == "not compiled; 137.0 of 141.0 GiB usable, 4 GiB reserved"


def test_keys_of_the_json_report(capsys):
    assert run(["plan", CONFIG, "--chip=h200", "--no-compile", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert " ".join(report) == (
        "chip device devices mesh model parameters latent_frames seconds_of_video chunk size batch "
        "accumulate dtype stream_dtype attention remat ffn_parts tokens_per_step flops_per_step "
        "flops recomputed_flops_per_step least_seconds_per_step state_bytes_per_device "
        "activation_bytes_per_device kv_cache_bytes collective_bytes_per_step "
        "peak_bytes_per_device fits device_bytes reserved_bytes precision clips_from"
    )
    assert " ".join(report["state_bytes_per_device"]) == (
        "parameters frozen_parameters average moments error_buffers batch"
    )
    assert " ".join(report["activation_bytes_per_device"]) == (
        "layer_inputs keys_and_values_of_a_layer keys_and_values_of_texts"
    )


def test_the_table_names_gradient_accumulation(capsys):
    words = ["--chip=h200", "--no-compile", "--config.batch=4", "--config.loop.accumulate=2"]
    assert run(["plan", f"{CONFIG}:16s", *words]) == 0
    assert ", gradient accumulation over 2 microbatches (" in capsys.readouterr().out


def test_the_table_tells_whether_the_step_fits(capsys, monkeypatch):
    idle = {"count": 0, "bytes": 0.0}
    result = {"peak": 2**37, "temporary": 1, "seconds": {}, "collectives": {"all-to-all": idle}}
    monkeypatch.setattr(plan_compile, "refusal", lambda: None)
    monkeypatch.setattr(plan_compile, "compile_step", lambda job: result)
    assert run(["plan", CONFIG, "--chip=h100"]) == 0
    assert "128.0 GiB per device: does not fit by 52.9 GiB" in capsys.readouterr().out
    assert run(["plan", CONFIG, "--chip=gb200"]) == 0
    assert "128.0 GiB per device: fits, 52.3 GiB to spare" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--chip=gb20", "unknown chip 'gb20'; did you mean 'gb200'?"),
        ("--chip=h200 --mesh=data=8,tp=4", "--mesh: unknown axis 'tp'"),
        ("--chip=h200 --mesh=sp=four", "--mesh: expected sp=NUMBER, got 'sp=four'"),
        ("--chip=h200 --mesh=sp=0", "mesh.sp must be >= 1, got 0"),
        ("--chip=h200 --mesh=sp=5", "24 attention heads do not split over mesh.sp = 5"),
        ("--chip=h200 --mesh=sp=8 --frames=96", "12 chunks of a sequence do not split over"),
        ("--chip=h200 --mesh=sp=3", "an axis of 14336 does not split into 3"),
        ("--chip=h200 --frames=100", "not a multiple of the 8 frames of a chunk. Set it to 96"),
        ("--chip=h200 --size=44x80", "size: expected 3 values, got 2"),
        ("--chip=h200 --size=44xx48", "--size: expected numbers separated by 'x', got '44xx48'"),
        ("--chip=h200 --size=45x80x48", "height and width must be even, got (45, 80, 48)"),
        ("--chip=h200 --size=44x80x16", "the model takes latents of 48 channels, got 16"),
        ("--chip=h200 --config.ffn_chunks=7", "ffn_chunks = 7 does not divide the 168960"),
        ("--chip=h200 --config.batch=9", "config.batch must be a multiple of config.mesh.data *"),
        (
            "--chip=h200 --config.loop.accumulate=3",
            "batch = 8 does not divide by loop.accumulate = 3",
        ),
        (
            "--chip=h200 --config.stage=vae",
            "config.stage must be 'clips' or 'dmd' for a plan, got 'vae'",
        ),
        ("--chip=h200 --frame=8", "unknown option '--frame'; did you mean '--frames'?"),
        ("--mesh=sp=4", "--chip"),
    ],
)
def test_mistakes_are_reported_before_anything_is_compiled(capsys, monkeypatch, words, message):
    monkeypatch.setattr(plan_compile, "refusal", lambda: None)
    monkeypatch.setattr(plan_compile, "compile_step", None)
    assert run(["plan", CONFIG, *words.split()]) == 2
    output = capsys.readouterr()
    assert message in output.err and not output.out


def test_a_missing_compiler_names_the_extra(capsys, monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *package: None if "xla_cuda13" in name else find_spec(name, *package),
    )
    monkeypatch.setattr(plan_compile, "PLUGIN_DIR", tmp_path)
    assert run(["plan", CONFIG, "--chip=h200"]) == 2
    error = capsys.readouterr().err
    assert "pip install -e '.[plan]'" in error and "--no-compile" in error


@pytest.mark.skipif(plan_compile.refusal() is not None, reason="no CUDA plugin to compile with")
def test_a_failed_compile_reports_the_reason(tmp_path, capsys):
    """The kernels do not support heads of 12 channels, so tracing the step fails."""
    folder = tmp_path / "tiny"
    save_component(folder, "dit", params_of(DiT(TINY, rngs=nnx.Rngs(0))), TINY)
    words = [f"--config.checkpoint={folder}", "--mesh=sp=2", "--chip=h200", "--size=4x6x4"]
    words += ["--frames=16", "--config.attention=mosaic"]
    assert run(["plan", CONFIG, *words]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "could not be compiled: Unsupported: mosaic attention" in last and "got 12" in last
