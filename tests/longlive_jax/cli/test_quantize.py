"""`longlive quantize`, sampling from packed checkpoints, and one-line errors."""

import json
import shutil

import pytest

from longlive_jax.cli.app import run
from longlive_jax.io.checkpoint import CHECKPOINT_MANIFEST, save_component
from longlive_jax.models.wan import DiTConfig
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.spec import UserError
from tests.random_dit import random_dit


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
def packed(checkpoint, tmp_path_factory):
    """The same checkpoint, packed in NVFP4."""
    out = tmp_path_factory.mktemp("packed") / "checkpoint"
    assert run(["quantize", f"--checkpoint={checkpoint}", f"--out={out}"]) == 0
    return out


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "shots.yaml"
    path.write_text("shots: [{prompt: a cat runs, chunks: 1}]")
    return f"--script={path}"


def test_formats_and_sizes_are_printed(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["quantize", f"--checkpoint={checkpoint}", f"--out={out}", "--policy=fp8"]
    assert run(command) == 0
    text = capsys.readouterr().out
    assert "FP8 E4M3" in text and "10 kernels packed" in text and f"wrote {out}" in text


def test_a_packed_checkpoint_can_be_sampled(packed, script, tmp_path, capsys):
    out = tmp_path / "video"
    assert run(["sample", f"--checkpoint={packed}", script, f"--out={out}"]) == 0
    text = capsys.readouterr().out
    assert "10 matrices in NVFP4 (weights mse, activations mse); quantize: xla, matmul: xla" in text
    assert (out / "video.mp4").is_file()


def test_packing_while_loading_serves_the_same_matrices(checkpoint, packed):
    """The precision cannot be changed afterwards."""
    packed_now = Pipeline.from_checkpoint(checkpoint, quant={"policy": "nvfp4"})
    packed_before = Pipeline.from_checkpoint(packed, quant={"policy": "nvfp4"})
    assert packed_now.describe_kernels() == packed_before.describe_kernels() != ()
    with pytest.raises(UserError, match="quant cannot change after loading"):
        packed_now.with_settings(quant={"policy": "none"})


BLACKWELL = "needs Blackwell (sm_100); this is cpu: use quant=fp8 or implementation='xla'"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "fp8"}, "but {packed} is packed as nvfp4"),
        ({"implementation": "mosaic"}, BLACKWELL),
        ({"policy": "nvfp5"}, "did you mean 'nvfp4'?"),
    ],
)
def test_settings_that_conflict_with_a_packed_checkpoint(packed, script, capsys, settings, message):
    overrides = [f"--config.sample.quant.{key}={value}" for key, value in settings.items()]
    assert run(["sample", f"--checkpoint={packed}", script, *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message.format(packed=packed) in line


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ({"implementation": "xla"}, "nothing is quantized"),
        ({"policy": "fp8", "implementation": "mosaic"}, "FP8 products have only XLA's"),
        ({"policy": "nvfp4", "implementation": "mosaic"}, "needs Blackwell"),
    ],
)
def test_settings_that_conflict_with_a_plain_checkpoint(checkpoint, quant, message):
    with pytest.raises(UserError, match=message):
        Pipeline.from_checkpoint(checkpoint, quant=quant)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy=nvfp5"], "did you mean 'nvfp4'?"),
        (["--policy=none"], "packs nothing"),
        (["--checkpoint=nowhere"], "is not a directory"),
        (["--source=ema"], "--workdir"),
        (["--lora_alpha=2"], "--lora=FILE"),
        (["--lora=nowhere.pt"], "no such file"),
    ],
)
def test_wrong_arguments_give_one_line(checkpoint, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    command = ["quantize", f"--checkpoint={checkpoint}", f"--out={out}", *arguments]
    assert run(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1] and not out.exists()


def test_widths_must_be_multiples_of_the_block_size(tiny_world, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["quantize", f"--checkpoint={tiny_world}", f"--out={out}"]) == 2
    assert "do not split into blocks of 16" in capsys.readouterr().err
    assert not out.exists()
