"""Plain options: what they set, what they contradict, and how they are shown."""

import pytest

from longlive_jax.cli import options
from longlive_jax.cli.app import Parser, run
from longlive_jax.spec import UserError


def parsed(verb, *argv, default="small_world:sample"):
    parser = Parser(verb, "for tests")
    parser.add_argument("--out")
    return options.parse_command(parser, argv, verb, default=default)


def test_sampling_options_set_their_settings():
    command = parsed(
        "sample", "--steps=8", "--guidance", "1.5", "--size=64x96", "--solver=euler",
        "--negative_prompt=123", "--kv=nvfp4", "--dtype=bfloat16", "--fps=12", "--quant=fp8",
        "--config.sample.window=5", "--out=x",
    )  # fmt: skip
    assert command.settings["sample"] == {
        "steps": 8,
        "guidance": 1.5,
        "size": (64, 96),
        "solver": "euler",
        "negative_prompt": "123",
        "kv": "nvfp4",
        "dtype": "bfloat16",
        "fps": 12.0,
        "quant": {"policy": "fp8"},
        "window": 5,
    }
    assert vars(command.args) == {"out": "x", "config": "small_world:sample"}
    assert command.given["sample.steps"] == "--steps"
    assert command.given["sample.window"] == "--config.sample.window"


@pytest.mark.parametrize(
    ("recipe", "batch"), [("ar_5b:16s", ("batch",)), ("small_world:ar", ("windows", "batch"))]
)
def test_training_options(recipe, batch):
    argv = ["--steps=3", "--batch=4", "--lr=1e-3", "--seed=5", "--mesh=data=2,sp=4"]
    settings = parsed("train", *argv, default=recipe).settings
    assert settings["loop"]["steps"] == 3 and settings["loop"]["seed"] == 5
    assert settings["optim"]["lr"] == 1e-3
    assert settings["mesh"] == {"data": 2, "fsdp": 1, "sp": 4}
    for key in batch:
        settings = settings[key]
    assert settings == 4


def test_evaluation_options():
    argv = ["--steps=4", "--guidance=3", "--solver=euler", "--batch=2"]
    settings = parsed("evaluate", *argv, default="small_world:evaluate").settings["evaluate"]
    assert settings["sample"] == {"steps": 4, "guidance": 3.0, "solver": "euler"}
    assert settings["batch"] == 2


def test_a_size_may_be_written_as_height_x_width():
    assert parsed("sample", "--config.sample.size=32x96").settings["sample"]["size"] == (32, 96)


def test_an_option_of_the_verb_must_agree_with_the_setting_of_its_name():
    parser = Parser("sample", "for tests")
    parser.add_argument("--checkpoint")
    argv = ["--checkpoint=a", "--config.checkpoint=b"]
    with pytest.raises(UserError, match=r"--checkpoint contradicts --config\.checkpoint=b"):
        options.parse_command(parser, argv, "sample", default="small_world:sample")


def test_an_option_may_repeat_an_override():
    argv = ["--steps=8", "--config.sample.steps=8", "--size=64x64", "--config.sample.size=(64,64)"]
    assert parsed("sample", *argv).settings["sample"]["steps"] == 8


@pytest.mark.parametrize(
    ("verb", "argv", "message"),
    [
        ("sample", ["--steps=8", "--config.sample.steps=4"], "--steps contradicts --config.sample"),
        ("train", ["--mesh=sp=2", "--config.mesh.data=2"], "--mesh contradicts --config.mesh.data"),
        ("train", ["--batch=2"], "--batch: stage 'vae' has no such setting"),
        ("train", ["--mesh=tp=2"], "unknown axis 'tp'"),
        ("sample", ["--steps=many"], "argument --steps: expected a whole number, got 'many'"),
        ("sample", ["--guidance=nan"], "expected a finite number, got 'nan'"),
        ("sample", ["--size=64"], "--size must be HEIGHTxWIDTH, such as 704x1280, got '64'"),
        ("sample", ["--size=65x64"], "not divisible by 32"),
        ("sample", ["--steps"], "sample: --steps needs a value; write --steps=VALUE"),
        ("sample", ["--solver=dpm"], "invalid choice: 'dpm'"),
        ("sample", ["--stesp=8"], "did you mean '--steps'"),
    ],
)
def test_mistakes(verb, argv, message):
    default = "small_world:vae" if verb == "train" else "small_world:sample"
    with pytest.raises(UserError, match=message):
        parsed(verb, *argv, default=default)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--steps=0"], "steps must be >= 1, got 0"),
        (["--steps=1000000000"], "steps must be <= 1000, got 1000000000"),
        (["--guidance=-1"], "guidance must be >= 0, got -1.0"),
        (["--config.sample.shift=1e999"], "shift"),
        (["--config.sample.window=10**9"], "window"),
        (["--config.sample.chunk_frames=1000000"], "chunk_frames must be <= "),
        (["--size=320000x64"], "must be <= 8192 pixels on each side"),
        (["--fps=0"], "fps must be >= 0.1, got 0.0"),
        (["--quant=fp4"], "unknown 'fp4'"),
    ],
)
def test_values_are_checked_before_anything_is_loaded(changes, message, tmp_path, capsys):
    script = tmp_path / "shots.yaml"
    script.write_text("shots: [{prompt: a cat, chunks: 1}]")
    out = tmp_path / "out"
    assert run(["sample", f"--script={script}", f"--out={out}", *changes]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("sample", ["--negative_prompt", "--size HxW", "{unipc,euler,sde}", "sample.vae_device"]),
        ("train", ["--mesh AXIS=N", "loop.save_every", "longlive settings STAGE"]),
        ("train --config=small_world:vae", ["phases[].frames", "values of small_world:vae"]),
        ("evaluate", ["evaluate.returning.cast", "--parts"]),
    ],
)
def test_help_lists_all_settings(verb, words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "180")
    assert run([*verb.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in words)
    assert max(map(len, text.splitlines())) <= 100
    assert "--config RECIPE" in text


def test_reading_the_settings_of_training_starts_no_backend():
    """Processes of a job must join each other before that."""
    import subprocess
    import sys

    code = (
        "from jax._src import xla_bridge\n"
        "from longlive_jax.cli.setting_groups import find_group\n"
        "find_group('train'), find_group('train clips'), find_group('sample')\n"
        "assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
