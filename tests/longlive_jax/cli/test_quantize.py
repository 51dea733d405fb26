"""`longlive quantize`, and sampling from what it writes: right, or one line and nothing written."""

import json
import shutil

import pytest

from longlive_jax.cli.app import run
from longlive_jax.io.checkpoint import MANIFEST, save_component
from longlive_jax.models.wan import DiTConfig
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.spec import UserError
from tests.random_dit import random_dit


@pytest.fixture(scope="module")
def checkpoint(tiny_world, tmp_path_factory):
    """A whole tiny model whose DiT splits into blocks of 16."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    shutil.copytree(tiny_world, folder)
    settings = json.loads((folder / MANIFEST).read_text())["components"]["dit"]
    cfg = DiTConfig(**settings | {"dim": 32, "ffn_dim": 48, "layers": 1})
    save_component(folder, "dit", random_dit(cfg)[1], cfg, overwrite=True)
    return folder


@pytest.fixture(scope="module")
def packed(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "checkpoint"
    assert run(["quantize", f"--checkpoint={checkpoint}", f"--out={out}"]) == 0
    return out


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "shots.yaml"
    path.write_text("shots: [{prompt: a cat runs, chunks: 1}]")
    return f"--script={path}"


def test_it_says_by_which_rules(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["quantize", f"--checkpoint={checkpoint}", f"--out={out}", "--policy=fp8"]
    assert run(command) == 0
    said = capsys.readouterr().out
    assert "FP8 E4M3" in said and "10 stacks of matrices" in said and f"wrote {out}" in said


def test_a_packed_checkpoint_is_sampled_as_it_is(packed, script, tmp_path, capsys):
    out = tmp_path / "video"
    assert run(["sample", f"--checkpoint={packed}", script, f"--out={out}"]) == 0
    said = capsys.readouterr().out
    assert "10 matrices in NVFP4 (weights mse, activations mse); quantize: xla, matmul: xla" in said
    assert (out / "video.mp4").is_file()


def test_packed_when_loaded(checkpoint, packed):
    """The same matrices as from the packed checkpoint, and precision stays once loaded."""
    now = Pipeline.from_checkpoint(checkpoint, quant={"policy": "nvfp4"})
    before = Pipeline.from_checkpoint(packed, quant={"policy": "nvfp4"})
    assert now.served() == before.served() != ()
    with pytest.raises(UserError, match="quant cannot change after loading"):
        now.with_settings(quant={"policy": "none"})


BLACKWELL = "needs Blackwell (sm_100); this is cpu: use quant=fp8 or implementation='xla'"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"policy": "fp8"}, "but {packed} is packed as nvfp4"),
        ({"implementation": "mosaic"}, BLACKWELL),
        ({"policy": "nvfp5"}, "did you mean 'nvfp4'?"),
    ],
)
def test_what_a_packed_checkpoint_cannot_do(packed, script, capsys, settings, said):
    words = [f"--config.sample.quant.{key}={value}" for key, value in settings.items()]
    assert run(["sample", f"--checkpoint={packed}", script, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said.format(packed=packed) in line


@pytest.mark.parametrize(
    ("quant", "said"),
    [
        ({"implementation": "xla"}, "nothing is quantized"),
        ({"policy": "fp8", "implementation": "mosaic"}, "products in FP8 are XLA's"),
        ({"policy": "nvfp4", "implementation": "mosaic"}, "needs Blackwell"),
    ],
)
def test_what_a_plain_checkpoint_cannot_do(checkpoint, quant, said):
    with pytest.raises(UserError, match=said):
        Pipeline.from_checkpoint(checkpoint, quant=quant)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--policy=nvfp5"], "did you mean 'nvfp4'?"),
        (["--policy=none"], "packs nothing"),
        (["--checkpoint=nowhere"], "no such checkpoint directory"),
        (["--source=ema"], "--workdir"),
        (["--lora_alpha=2"], "--lora=FILE"),
        (["--lora=nowhere.pt"], "no such file"),
    ],
)
def test_mistakes_are_one_line(checkpoint, tmp_path, capsys, words, said):
    out = tmp_path / "out"
    command = ["quantize", f"--checkpoint={checkpoint}", f"--out={out}", *words]
    assert run(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[-1] and not out.exists()


def test_widths_must_split_into_blocks(tiny_world, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["quantize", f"--checkpoint={tiny_world}", f"--out={out}"]) == 2
    assert "do not split into blocks of 16" in capsys.readouterr().err
    assert not out.exists()
