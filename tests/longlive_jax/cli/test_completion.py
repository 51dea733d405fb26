"""Completion scripts: what bash completes, and what all shells know."""

import shutil
import subprocess

import pytest

from longlive_jax.cli import completion
from longlive_jax.cli.app import SUBVERBS, VERBS, run


@pytest.fixture(scope="module")
def commands():
    return {name: list(completion.command_words(name)) for name in completion.command_names()}


@pytest.fixture(scope="module")
def completed(commands, tmp_path_factory):
    """A function that completes a command line in bash."""
    script = tmp_path_factory.mktemp("bash") / "longlive.bash"
    script.write_text(completion.bash(commands))
    call = (
        f'source {script}; COMP_LINE="$1"; COMP_POINT=${{#1}}; _longlive; echo "${{COMPREPLY[*]}}"'
    )

    def complete(line):
        done = subprocess.run(
            ["bash", "-c", call, "bash", line], capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    return complete


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("longlive ", [*VERBS, "help"]),
        ("longlive quan", ["quantize"]),
        ("longlive help ev", ["evaluate"]),
        ("longlive data ", ["check", "encode"]),
        ("longlive data encode --vae", ["--vae_parallel="]),
        ("longlive sample --script=x.yaml --lat", ["--latents"]),
        ("longlive sample --solver=", ["unipc", "euler", "sde"]),
        ("longlive sample --solver eu", ["euler"]),
        ("longlive sample --config=small_world:n", ["nvfp4"]),  # : and = are word breaks of bash
        ("longlive evaluate --config small_world:e", ["evaluate"]),
        ("longlive plan --config=ar_5b:1", ["16s"]),
        (
            "longlive sample --config.sample.kv_",
            [
                "--config.sample.kv_smoothing=",
                "--config.sample.kv_reader=",
            ],
        ),
        ("longlive train --config.optim.l", ["--config.optim.lr="]),
        ("longlive sample --config.sample.kv=", ["model", "nvfp4"]),
        ("longlive sample --config.sample.shot_sinks=", ["true", "false"]),
        ("longlive completion ", ["bash", "zsh", "fish"]),
        ("longlive sample --script=", []),  # files, by readline
    ],
)
def test_bash(line, words, completed):
    assert completed(line) == words


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_scripts(shell, commands, tmp_path):
    text = getattr(completion, shell)(commands)
    for name in [*VERBS, *(sub for subs in SUBVERBS.values() for sub in subs), "small_world:nvfp4"]:
        assert name in text
    option = "-l negative_prompt" if shell == "fish" else "--negative_prompt="
    assert option in text
    if shutil.which(shell):  # zsh and fish need not be there; bash is tested above
        path = tmp_path / shell
        path.write_text(text)
        subprocess.run([shell, "-n", str(path)], check=True)


def test_mistakes(capsys):
    assert run(["completion"]) == 2 and run(["completion", "tcsh"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
