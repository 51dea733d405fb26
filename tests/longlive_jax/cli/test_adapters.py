"""Adapters on the command line: sample, quantize, convert and export, and one-line errors."""

import json
import shutil

import numpy as np
import pytest

from longlive_jax.adapters import export_original, export_peft, load_adapter, save_adapter
from longlive_jax.cli.app import run
from longlive_jax.io.checkpoint import CHECKPOINT_MANIFEST, save_component
from longlive_jax.io.models import load_model
from longlive_jax.io.packed_kernels import read_quantization
from longlive_jax.models.params import params_of
from longlive_jax.models.wan import DiTConfig
from longlive_jax.quant.lora import merge_adapter
from longlive_jax.quant.packed import quantize_params
from longlive_jax.quant.policy import named
from longlive_jax.sampling.settings import checkpoint_settings
from tests.longlive_jax.adapters.conftest import random_adapter, same_bits
from tests.random_dit import random_dit

SETTINGS = {"steps": 1, "levels": (0.9,), "solver": "euler", "guidance": 1.0}


@pytest.fixture(scope="module")
def checkpoint(tiny_world, tmp_path_factory):
    """A complete tiny model, with a DiT whose widths are multiples of 16."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    shutil.copytree(tiny_world, folder)
    settings = json.loads((folder / CHECKPOINT_MANIFEST).read_text())["components"]["dit"]
    cfg = DiTConfig(**settings | {"dim": 32, "ffn_dim": 48, "layers": 1})
    save_component(folder, "dit", random_dit(cfg)[1], cfg, overwrite=True)
    return folder


@pytest.fixture(scope="module")
def params(checkpoint):
    return params_of(load_model(checkpoint, "dit"))


@pytest.fixture(scope="module")
def adapter(params):
    return random_adapter(params, settings=SETTINGS, provenance={"step": 9}, role="generator")


@pytest.fixture(scope="module")
def ours(adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "ours"
    save_adapter(folder, adapter)
    return folder


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "shots.yaml"
    path.write_text("shots: [{prompt: a cat runs, chunks: 1}]")
    return f"--script={path}"


def test_sampling_with_adapters_and_again_from_the_record(
    checkpoint, ours, adapter, script, tmp_path, capsys
):
    """The adapter's settings hold, and the record repeats settings and adapters."""
    export_peft(tmp_path / "peft", adapter)
    out, again = tmp_path / "video", tmp_path / "again"
    command = ["sample", f"--checkpoint={checkpoint}", script, "--latents"]
    adapters = [f"--adapter={ours}:0.5", f"--adapter={tmp_path / 'peft'}"]
    assert run([*command, f"--out={out}", *adapters]) == 0
    text = capsys.readouterr().out
    assert f"adapter: {ours} (generator): rank 4, alpha 4" in text and "; at scale 0.5" in text
    record = json.loads((out / "video.json").read_text())
    assert record["settings"]["steps"] == 1 and record["settings"]["levels"] == [0.9]
    assert [(x["scale"], x["fingerprint"]) for x in record["adapters"]] == [
        (0.5, adapter.fingerprint),
        (1.0, adapter.fingerprint),
    ]
    assert run(["sample", f"--script={out / 'video.json'}", "--latents", f"--out={again}"]) == 0
    texts = capsys.readouterr()
    assert "adapters is" not in texts.out + texts.err
    np.testing.assert_array_equal(*(np.load(next(folder.glob("*.npy"))) for folder in (out, again)))


def test_the_command_line_overrides_the_adapters_settings(
    checkpoint, ours, script, tmp_path, capsys
):
    out = tmp_path / "video"
    command = ["sample", f"--checkpoint={checkpoint}", script, f"--out={out}", "--steps=2"]
    assert run([*command, f"--adapter={ours}"]) == 0
    texts = capsys.readouterr()
    (note,) = (x for x in (texts.out + texts.err).splitlines() if "was made for" in x)
    assert note.endswith("was made for 1 steps and is sampled with 2")
    settings = json.loads((out / "video.json").read_text())["settings"]
    assert (settings["steps"], settings["levels"], settings["solver"]) == (2, None, "euler")


def test_quantizing_merges_or_keeps_a_branch(checkpoint, params, ours, adapter, tmp_path, capsys):
    merged, branch = tmp_path / "merged", tmp_path / "branch"
    command = ["quantize", f"--checkpoint={checkpoint}", "--dtype=float32"]
    two = [f"--adapter={ours}:0.5", f"--adapter={ours}:0.25"]
    assert run([*command, f"--out={merged}", *two]) == 0
    assert run([*command, f"--out={branch}", *two, "--adapter_mode=branch"]) == 0
    assert "1 steps, guidance 1, solver euler" in capsys.readouterr().out
    assert read_quantization(merged).merged_lora == "ours:0.5, ours:0.25"
    assert checkpoint_settings(merged)["levels"] == [0.9]
    want = quantize_params(merge_adapter(params, adapter.branches, 0.75), named("nvfp4"))
    got, beside = (params_of(load_model(x, "dit")) for x in (merged, branch))
    kernels = [tree["blocks"]["ffn"]["up"]["kernel"] for tree in (got, want, beside)]
    values = [x.dequantized() for x in kernels]
    # The sums differ in their last bits, and so does the scale of all values.
    assert np.mean(np.abs(values[0] - values[1]) > 1e-4) < 0.01
    up, low = adapter.branches["blocks"]["ffn"]["up"], kernels[2].branch
    assert low.a.shape == (1, 32, 8) and low.scale == 1.0
    np.testing.assert_allclose(low.a @ low.b, 0.75 * up["a"] @ up["b"], atol=1e-5)
    plain = tmp_path / "plain"
    assert run([*command, f"--out={plain}"]) == 0
    without = params_of(load_model(plain, "dit"))["blocks"]["ffn"]["up"]["kernel"]
    assert same_bits(kernels[2].weight, without.weight)


def test_converting_and_exporting_an_adapter(ours, adapter, tmp_path, capsys):
    """Ours -> PEFT -> ours, and ours -> .pt -> ours, bit for bit."""
    assert run(["export", f"--source={ours}", f"--out={tmp_path / 'peft'}"]) == 0
    assert run(["export", f"--source={tmp_path / 'peft'}", f"--out={tmp_path / 'model.pt'}"]) == 0
    for name in ("peft", "model.pt"):
        back = tmp_path / f"back_{name}"
        assert run(["convert", f"--source={tmp_path / name}", f"--out={back}"]) == 0
        got = load_adapter(back)
        assert same_bits(got.branches, adapter.branches)
        assert (got.settings, got.role, got.alpha) == (
            adapter.settings, "generator", adapter.alpha,
        )  # fmt: skip
    text = capsys.readouterr().out
    assert f"plug it in: longlive sample --adapter={back}" in text
    assert "sampling settings of the adapter: " in text and "lacks" not in text
    first, again = (json.loads((x / CHECKPOINT_MANIFEST).read_text()) for x in (ours, back))
    assert first["arrays"] == again["arrays"]


def test_both_adapters_of_a_file_are_converted_or_one_by_its_role(adapter, params, tmp_path):
    critic = random_adapter(params, seed=5, role="critic")
    export_original(tmp_path / "model.pt", generator=adapter, critic=critic, step=9)
    source = f"--source={tmp_path / 'model.pt'}"
    both = tmp_path / "both"
    assert run(["convert", source, f"--out={both}"]) == 0
    assert run(["convert", source, f"--out={tmp_path / 'alone'}", "--role=critic"]) == 0
    assert same_bits(load_adapter(tmp_path / "alone").branches, critic.branches)
    assert run(["export", f"--source={both}", f"--out={tmp_path / 'again.pt'}"]) == 0
    for role, want in (("generator", adapter), ("critic", critic)):
        assert same_bits(load_adapter(tmp_path / "again.pt", role=role).branches, want.branches)
    assert run(["export", f"--source={both}", "--role=critic", f"--out={tmp_path / 'one'}"]) == 0
    assert same_bits(load_adapter(tmp_path / "one").branches, critic.branches)


@pytest.mark.parametrize(
    ("verb", "option", "message"),
    [
        ("sample", "--adapter=nowhere.safetensors", "no such file"),
        ("sample", "--adapter={ours}:much", "the scale must be a finite number, got 'much'"),
        ("sample", "--adapter={other}", "is for another model: it has 24 inputs"),
        ("sample", "--adapter={nan}", "NaN"),
        ("quantize", "--adapter=nowhere.safetensors", "no such file"),
        ("quantize", "--adapter={ours}:nan", "the scale must be a finite number"),
        ("quantize", "--adapter={other}", "is for another model: it has 24 inputs"),
        ("quantize", "--adapter={ours}", "give --adapter alone"),
    ],
)
def test_mistakes_are_one_line(
    checkpoint, ours, adapter, tiny_world, script, tmp_path, capsys, verb, option, message
):
    other = random_adapter(params_of(load_model(tiny_world, "dit")))
    save_adapter(tmp_path / "other", other)
    nan = export_peft(tmp_path / "nan", adapter)[0]
    data = bytearray(nan.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    nan.write_bytes(data)
    option = option.format(ours=ours, other=tmp_path / "other", nan=tmp_path / "nan")
    out = tmp_path / "out"
    words = [verb, f"--checkpoint={checkpoint}", f"--out={out}", option]
    words += [script] if verb == "sample" else []
    words += [f"--lora={nan}"] if "alone" in message else []
    assert run(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not list(out.glob("*"))
