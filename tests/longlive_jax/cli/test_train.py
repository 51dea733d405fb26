"""`longlive train`: the three stages at minimal size, and mistakes detected before training."""

import json
import shutil

import chex
import pytest

from longlive_jax.cli.app import run
from longlive_jax.io.checkpoint import load_component, read_manifest
from longlive_jax.sampling.settings import spec_for
from longlive_jax.small_world import world
from longlive_jax.training import loop

CONFIG = "--config=configs/small_world.py"
SHORT = ["loop.steps=2", "loop.log_every=1", "loop.save_every=2", "optim.name=adamw"]
VAE = [
    "model.encoder_dim=4", "model.decoder_dim=4", "model.z_dim=2", "model.dim_mult=(1,1,1,1)",
    "model.decoder_mult=None", "model.latent_mean=(0.0,0.0)", "model.latent_std=(1.0,1.0)",
    "phases=[{'steps': 2, 'batch': 1, 'frames': 5}]", "held_out_clips=1",
]  # fmt: skip
TEXT = ["model.dim=8", "model.dim_attn=8", "model.ffn_dim=8", "model.heads=2", "model.layers=1"]
AR = [
    "model.dim=12", "model.ffn_dim=12", "model.freq_dim=4", "model.text_dim=8", "model.heads=2",
    "model.layers=1", "model.in_channels=2", "model.out_channels=2", "held_out_batches=1",
    "corpus.videos=8", "corpus.chunks=4", "corpus.shot_chunks=(1,2)", "save_dtype=float16",
    "windows.batch=1", "windows.targets=2", "windows.window=3",
]  # fmt: skip


def command(stage, folder, changes=()):
    overrides = [f"--config.{change}" for change in (*SHORT, *changes)]
    folders = [f"--workdir={folder / stage}", f"--out={folder / 'checkpoint'}"]
    return ["train", f"{CONFIG}:{stage}", *overrides, *folders]


def test_finished_run_is_reported_again(tmp_path, capfd):
    assert run(command("text", tmp_path, TEXT)) == 0
    first = capfd.readouterr().out
    assert "text: 2 steps" in first
    # The next step is told: the stages that are still missing.
    assert f"{tmp_path / 'checkpoint'} has no VAE and no DiT yet; make them with" in first
    assert "--config=small_world:vae" in first and "--config=small_world:ar" in first
    assert run(command("text", tmp_path, TEXT)) == 0
    output = capfd.readouterr()
    assert f"Resumed from step 2 of {tmp_path / 'text'}." in output.out
    assert "orbax" not in output.err.lower()


@pytest.mark.slow
def test_all_stages_write_one_checkpoint(tmp_path, capsys):
    for stage, changes in {"vae": VAE, "text": TEXT, "ar": AR}.items():
        assert run(command(stage, tmp_path, changes)) == 0
        assert f"{stage}: 2 steps" in capsys.readouterr().out
        lines = (tmp_path / stage / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 2]
        assert (tmp_path / stage / "curves.png").exists()
    checkpoint = tmp_path / "checkpoint"
    # 1. The checkpoint has all components and the settings of the run.
    manifest = read_manifest(checkpoint)
    assert set(manifest["components"]) == {"vae", "umt5", "dit"}
    assert manifest["provenance"]["dit"]["stage"] == "ar"
    assert any(std != 1.0 for std in manifest["components"]["vae"]["latent_std"])
    assert "float16" in json.dumps(manifest["arrays"]["dit"])
    assert (checkpoint / "tokenizer.model").exists()
    spec = spec_for(checkpoint)
    assert spec.window == 3 and spec.size == (world.HEIGHT, world.WIDTH)
    # 2. Training that continues from it, at learning rate 0, changes nothing.
    before, _ = load_component(checkpoint, "dit")
    again = ["start=checkpoint", "optim.lr=0.0", "optim.weight_decay=0.0"]
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "ar" / "corpus.npz", tmp_path / "again")
    arguments = [
        x.replace(f"{tmp_path}/ar", f"{tmp_path}/again")
        for x in command("ar", tmp_path, [*AR, *again])
    ]
    assert run(arguments) == 0
    chex.assert_trees_all_close(load_component(checkpoint, "dit")[0], before, atol=1e-3)
    provenance = read_manifest(checkpoint)["provenance"]["dit"]
    assert provenance["continues"] == manifest["provenance"]["dit"]
    assert run(arguments) == 0  # resumed at its end: the same export
    assert read_manifest(checkpoint)["provenance"]["dit"] == provenance
    assert run([*arguments, f"--workdir={tmp_path / 'other'}", "--config.model.layers=2"]) == 2
    assert "its DiT is not config.model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--config.stage=vea"], "did you mean 'vae'?"),
        (["--config.optim.beta=0.9"], "config.optim: unknown key 'beta'"),
        (["--config.loop.steps=3"], "phases have 3200 steps"),
        (["--workdir=/proc/nowhere"], "cannot write to /proc/nowhere"),
        (["--out=/proc/nowhere"], "cannot write to /proc/nowhere"),
        (["--out=."], "holds other files"),
        (["--workdr=x"], "did you mean '--workdir'?"),
        (["--out="], "--out is missing: the checkpoint directory for the trained model"),
        (["--workdir="], "--workdir is missing: the folder for metrics"),
    ],
)
def test_mistakes_print_one_line_and_train_nothing(changes, message, tmp_path, capsys, monkeypatch):
    def train(*_, **__):
        raise AssertionError("nothing may be trained")

    monkeypatch.setattr(loop, "train", train)
    folders = [f"--workdir={tmp_path / 'work'}", f"--out={tmp_path / 'out'}"]
    assert run(["train", f"{CONFIG}:vae", *folders, *changes]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_work_directory_inside_the_checkpoint_is_rejected(tmp_path, capsys):
    for workdir in (tmp_path, tmp_path / "work"):
        assert run(["train", f"{CONFIG}:text", f"--workdir={workdir}", f"--out={tmp_path}"]) == 2
        assert "choose a folder outside it" in capsys.readouterr().err


def test_stage_without_the_earlier_stages(tmp_path, capsys):
    assert run(command("ar", tmp_path)) == 2
    error = capsys.readouterr().err
    assert "has no VAE and no text encoder yet" in error and error.count("\n") == 1
    assert "longlive train --config=small_world:vae" in error
