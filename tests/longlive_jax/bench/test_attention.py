"""The attention benchmark: its work counts, its report, and its checks."""

import json
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from longlive_jax.bench import attention as bench
from longlive_jax.bench import flex_attention
from longlive_jax.cli.app import run
from pallas_kernels.tokens import visible

TINY = [
    "--seconds=1", "--chunk=2", "--rows=2", "--columns=3", "--heads=1", "--width=8",
    "--repeats=1", "--product=64",
]  # fmt: skip


def spec(**settings) -> bench.AttentionSpec:
    sizes = {"seconds": 1.0, "chunk_frames": 2, "rows": 2, "columns": 3, "heads": 3, "width": 5}
    return bench.AttentionSpec(**{**sizes, **settings})


def test_report_as_json_and_as_a_file(tmp_path, capsys):
    out = tmp_path / "new" / "attention.json"
    assert run(["bench", "attention", *TINY, "--json", f"--out={out}"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(out.read_text())
    assert report["tokens"] == 2 * 6 * 2 * 3 and report["machine"]["jax"] == jax.__version__
    assert set(report["implementations"]) | set(report["not_run"]) == {
        *bench.IMPLEMENTATIONS,
        "flex_attention",
    }
    xla = report["implementations"]["xla"]
    rate = report["matmul_flop_per_second"][report["spec"]["dtype"]]
    for part in ("forward", "forward_backward"):
        assert xla["seconds"][part]["median"] > 0
        share = xla["flop_per_second"][part] / rate
        assert xla["share_of_matmul"][part] == pytest.approx(share, rel=1e-3)  # rounded
    ratios = [
        report["times_as_fast"][a][b] for a, b in (("xla", "reference"), ("reference", "xla"))
    ]
    assert ratios[0]["forward"] * ratios[1]["forward"] == pytest.approx(1, rel=0.2)


def test_report_as_a_table(capsys):
    assert run(["bench", "attention", *TINY]) == 0
    text = capsys.readouterr().out
    assert "backward" in text and "both" in text and "reference" in text
    if jax.default_backend() == "cpu":
        assert "mosaic: not run" in text and "cudnn: not run" in text


def test_useful_pairs_and_tiles_are_those_of_the_mask():
    small = spec()
    tokens = small.tokens()
    assert small.pairs() == np.sum(visible(tokens, tokens))
    shares = bench.pair_shares(small, tokens)
    assert shares == {"visible": round(small.pairs() / 72**2, 4), "visited": 1.0, "tile": 128}
    long = bench.AttentionSpec(seconds=8, rows=4, columns=16)  # chunks of whole tiles
    shares = bench.pair_shares(long, long.tokens())
    assert shares["visited"] == shares["visible"] < 0.3
    assert bench.AttentionSpec().tokens().chunk_index.shape == (168_960,)


def test_the_reference_is_skipped_if_memory_is_too_small(monkeypatch):
    monkeypatch.setattr(bench, "memory_bytes", lambda: 1 << 18)
    tokens = spec().tokens()
    assert bench.refusal(spec(), tokens, "xla") is None
    assert "dense logits" in (bench.refusal(spec(), tokens, "reference") or "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds=1.1", "--chunk=4"], "7 latent frames, which is not a multiple of 4"),
        (["--heads=0"], "heads must be >= 1, got 0"),
        (["--dtype=float8"], "choose bfloat16 or float32"),
        (["--second=4"], "did you mean '--seconds'"),
        (["--out=/proc/x/y.json"], "cannot write"),
    ],
)
def test_bad_arguments_are_reported(words, message, capsys):
    assert run(["bench", "attention", *words]) == 2
    assert message in capsys.readouterr().err


SETTINGS = {"frames": 3, "frame": 2, "chunk": 1, "heads": 1, "width": 4, "repeats": 1}


def test_missing_pytorch_is_reported(monkeypatch):
    monkeypatch.setattr(flex_attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(flex_attention.CannotRun, match="PyTorch is not installed"):
        flex_attention.run_in_process(SETTINGS)


@pytest.mark.parametrize(
    ("code", "stdout", "stderr", "message"),
    [
        (0, 'FLEX {"refusal": "no CUDA device"}', "", "no CUDA device"),
        (1, "", "Traceback\nOutOfMemoryError: 12 GiB", "exit code 1: OutOfMemoryError: 12 GiB"),
        (0, "", "", "no output"),
    ],
)
def test_errors_of_the_process_are_passed_on(code, stdout, stderr, message, monkeypatch):
    done = subprocess.CompletedProcess([], code, stdout, stderr)
    monkeypatch.setattr(flex_attention.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(flex_attention.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(flex_attention.CannotRun, match=message):
        flex_attention.run_in_process(SETTINGS)


def test_the_process_prints_one_line_of_json(monkeypatch, capsys):
    fake = types.SimpleNamespace(
        __version__="0", cuda=types.SimpleNamespace(is_available=lambda: False)
    )
    monkeypatch.setitem(sys.modules, "torch", fake)
    assert flex_attention.main([json.dumps(SETTINGS)]) == 0
    line = capsys.readouterr().out.removeprefix(flex_attention.PREFIX)
    assert "found no CUDA device" in json.loads(line)["refusal"]


def test_the_mask_mod_equals_the_mask():
    tokens = bench.AttentionSpec(seconds=0.5, chunk_frames=1, rows=1, columns=2).tokens()
    fake = types.SimpleNamespace(where=np.where)  # tensors and arrays index and compare alike
    is_visible = flex_attention.mask_mod(fake, SETTINGS)
    index = np.arange(len(tokens))
    got = is_visible(0, 0, index[:, None], index[None])
    np.testing.assert_array_equal(got, visible(tokens, tokens))
