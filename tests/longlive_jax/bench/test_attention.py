"""The attention benchmark counts right, times what runs, and says what does not."""

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
    sizes = {"seconds": 1.0, "chunk": 2, "rows": 2, "columns": 3, "heads": 3, "width": 5}
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
    said = capsys.readouterr().out
    assert "backward" in said and "both" in said and "reference" in said
    if jax.default_backend() == "cpu":
        assert "mosaic: not run" in said and "cudnn: not run" in said


def test_useful_pairs_and_tiles_are_those_of_the_mask():
    small = spec()
    tokens = small.tokens()
    assert small.pairs() == np.sum(visible(tokens, tokens))
    shares = bench._pairs(small, tokens)
    assert shares == {"visible": round(small.pairs() / 72**2, 4), "visited": 1.0, "tile": 128}
    long = bench.AttentionSpec(seconds=8, rows=4, columns=16)  # chunks fill whole tiles
    shares = bench._pairs(long, long.tokens())
    assert shares["visited"] == shares["visible"] < 0.3
    assert bench.AttentionSpec().tokens().chunk_index.shape == (168_960,)


def test_the_oracle_is_left_out_where_it_does_not_fit(monkeypatch):
    monkeypatch.setattr(bench, "_memory", lambda: 1 << 18)
    tokens = spec().tokens()
    assert bench._refusal(spec(), tokens, "xla") is None
    assert "dense logits" in (bench._refusal(spec(), tokens, "reference") or "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds=1.1", "--chunk=4"], "7 latent frames, no whole number of chunks of 4"),
        (["--heads=0"], "heads is 0"),
        (["--dtype=float8"], "choose bfloat16 or float32"),
        (["--second=4"], "did you mean '--seconds'"),
        (["--out=/proc/x/y.json"], "cannot write"),
    ],
)
def test_mistakes(words, message, capsys):
    assert run(["bench", "attention", *words]) == 2
    assert message in capsys.readouterr().err


SETTINGS = {"frames": 3, "frame": 2, "chunk": 1, "heads": 1, "width": 4, "repeats": 1}


def test_without_pytorch_it_says_so(monkeypatch):
    monkeypatch.setattr(flex_attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(flex_attention.CannotRun, match="PyTorch is not installed"):
        flex_attention.in_a_process(SETTINGS)


@pytest.mark.parametrize(
    ("code", "printed", "complaint", "message"),
    [
        (0, 'FLEX {"refusal": "no CUDA device"}', "", "no CUDA device"),
        (1, "", "Traceback\nOutOfMemoryError: 12 GiB", "exit code 1: OutOfMemoryError: 12 GiB"),
        (0, "", "", "said nothing"),
    ],
)
def test_what_the_process_says_is_passed_on(code, printed, complaint, message, monkeypatch):
    done = subprocess.CompletedProcess([], code, printed, complaint)
    monkeypatch.setattr(flex_attention.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(flex_attention.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(flex_attention.CannotRun, match=message):
        flex_attention.in_a_process(SETTINGS)


def test_the_process_prints_a_line_that_is_understood(monkeypatch, capsys):
    fake = types.SimpleNamespace(
        __version__="0", cuda=types.SimpleNamespace(is_available=lambda: False)
    )
    monkeypatch.setitem(sys.modules, "torch", fake)
    assert flex_attention.main([json.dumps(SETTINGS)]) == 0
    line = capsys.readouterr().out.removeprefix(flex_attention.PREFIX)
    assert "sees no CUDA device" in json.loads(line)["refusal"]


def test_the_same_mask_by_index():
    tokens = bench.AttentionSpec(seconds=0.5, chunk_frames=1, rows=1, columns=2).tokens()
    fake = types.SimpleNamespace(where=np.where)  # tensors and arrays index and compare alike
    seen = flex_attention.mask_mod(fake, SETTINGS)
    at = np.arange(len(tokens))
    np.testing.assert_array_equal(seen(0, 0, at[:, None], at[None]), visible(tokens, tokens))
