"""Reports of the benchmarks: their fields and compilation counts; no time is compared."""

import json

import jax
import jax.numpy as jnp
import pytest

from longlive_jax.bench import dit_call
from longlive_jax.bench.timing import Compilations, Stages, machine, peak_memory, repeated
from longlive_jax.cli.app import run
from longlive_jax.models.wan import DiTConfig


def test_sampler_report(tiny_world, tmp_path, capsys):
    out = tmp_path / "new" / "result.json"
    words = [f"--checkpoint={tiny_world}", "--chunks=6", "--steps=1", "--json", f"--out={out}"]
    assert run(["bench", "sampler", *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(out.read_text())
    stages = {"load", "compile", "text", "first_chunk", "steady_chunk", "vae", "write"}
    assert stages <= set(report["seconds"])
    assert report["frames_per_chunk"] == 16 and report["peak"]["host_gib"] > 0
    assert set(report["frames_per_second"]) == {"dit", "vae", "all"}
    assert report["spec"]["sample"]["steps"] == 1


def test_one_compilation_serves_all_chunks_and_videos(tiny_world, capsys):
    assert run(["bench", "sampler", f"--checkpoint={tiny_world}", "--chunks=6", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["compilations_of_second_video"] == {}
    # The first chunk of a video has fewer frames than the others, so the decoder compiles twice.
    assert {k: v for k, v in report["compilations"].items() if k != "_encode"} == {
        "_step": 1,
        "_text": 1,
        "_bytes": 2,
    }


def test_call_report(monkeypatch, capsys):
    model = DiTConfig(
        dim=16, ffn_dim=16, freq_dim=8, text_dim=8, text_len=4, heads=2, layers=2,
        in_channels=4, out_channels=4,
    )  # fmt: skip
    tiny = dit_call.CallSpec(model=model, chunk_frames=2, latent=(4, 4), window=3, repeats=2)
    monkeypatch.setitem(dit_call.MODEL_SPECS, "mid", tiny)
    assert run(["bench", "sampler", "--model=mid"]) == 0
    out = capsys.readouterr().out
    assert "seconds per call:" in out and "seconds per chunk:" in out
    assert "denoising call: 1" in out and "chunk step: 1" in out


def test_flops_of_a_call_counted_by_hand():
    model = DiTConfig(dim=2, heads=1, ffn_dim=3, text_len=5, layers=7)
    spec = dit_call.CallSpec(model=model, chunk_frames=1, latent=(4, 4), window=2)
    queries, keys = 4, 8
    linears = queries * (6 * 2 * 2 + 2 * 2 * 3)
    attention = 2 * queries * (keys + 5) * 2
    assert dit_call.call_flops(spec) == 2 * 7 * (linears + attention)


def test_compilations_are_counted_by_function():
    @jax.jit
    def twice(x):
        return 2 * x

    small, large = jnp.ones(3), jnp.ones(4)
    with Compilations() as compiled:
        twice(small), twice(small), twice(large)
    twice(jnp.ones(5))
    assert compiled.counts["twice"] == 2 and compiled.seconds > 0


def test_stages_wait_and_add_up():
    stages = Stages()
    assert stages.run("add", jnp.add, jnp.ones(2), 1).tolist() == [2, 2]
    stages.run("add", lambda: None)
    assert stages.total("add") >= stages.median("add", skip=1) > 0
    assert stages.total("nothing") == 0


def test_repeats_must_be_positive():
    with pytest.raises(ValueError, match="repeats must be >= 1, got 0"):
        repeated(lambda: None, 0)
    assert repeated(lambda: None, 2)["repeats"] == 2


def test_machine_and_memory():
    about = machine()
    assert about["device"] and about["cores"] >= 1 and about["jax"] == jax.__version__
    assert peak_memory()["host_gib"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["simpler"], "did you mean 'sampler'"),
        (["sampler", "--model=med"], "did you mean 'mid'"),
        (["sampler", "--checkpoint=/nowhere"], "is not a directory"),
        (["sampler", "--chunks=1", "--checkpoint=/nowhere"], "chunks must be >= 6 "),
        (["sampler", "--model=mid", "--out=/proc/x/y.json"], "cannot write"),
    ],
)
def test_mistakes(words, message, capsys):
    assert run(["bench", *words]) == 2
    assert message in capsys.readouterr().err
