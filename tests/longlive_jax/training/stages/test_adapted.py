"""LoRA on own clips by the command: backbones, meshes, resuming, the export, and bad settings."""

import chex
import jax
import numpy as np
import pytest

from longlive_jax.adapters import load_adapter
from longlive_jax.cli.app import run
from longlive_jax.io.checkpoint import read_manifest, weights_fingerprint
from tests.longlive_jax.training.stages.test_wan_ar import (
    EIGHT_DEVICES,
    ONE_DEVICE,
    held_out_error,
    losses,
    records,
)

SETTINGS = (
    "batch=4", "dtype=float32", "loop.log_every=1", "loop.save_every=2", "optim.lr=1e-2",
    "optim.warmup=0", "ema.start=1", "window=none", "lora.rank=4",
)  # fmt: skip
FROZEN = {"none": 2e-4, "fp8": 2e-4, "nvfp4_frozen": 2e-2}
"""Precision of the frozen model, and how far numbers may differ between meshes after an update: the
rounding noise of NVFP4's gradients depends on the mesh. (With rounding to nearest they are equal:
objectives/dmd/test_sharded.py.)"""
FIRST_LOSS = 2e-4
"""Before the first update nothing is rounded stochastically."""


def command(data_dir, workdir, *changes):
    """Arguments of `longlive train` with the recipe for own clips."""
    paths = (f"checkpoint={data_dir / 'checkpoint'}", f"clips={data_dir / 'encoded'}")
    settings = [setting for change in changes for setting in change.split(",")]
    overrides = [f"--config.{setting}" for setting in (*SETTINGS, *paths, *settings)]
    outputs = [f"--workdir={workdir}", f"--out={workdir}-out"]
    return ["train", "--config=configs/own_clips.py:lora", *overrides, *outputs]


@pytest.mark.parametrize(
    "policy", ["none", pytest.param("fp8", marks=pytest.mark.slow), "nvfp4_frozen"]
)
def test_the_adapter_trains_on_eight_devices_like_on_one(data_dir, tmp_path, policy):
    evaluation = (f"held_out={data_dir / 'encoded'}", "held_out_batches=1")
    settings = (f"quant.policy={policy}", *evaluation, "loop.steps=2")
    if policy == "nvfp4_frozen":
        settings = (*settings, "preview.seconds=0.5", "preview.prompts=['a cat runs']")
    single, eight = tmp_path / "single", tmp_path / "eight"
    for workdir, mesh in ((single, ONE_DEVICE), (eight, EIGHT_DEVICES)):
        assert run(command(data_dir, workdir, mesh, *settings)) == 0
    for want, got in zip(records(single), records(eight), strict=True):
        for name in ("loss", "grad_norm"):
            assert got[name] == pytest.approx(want[name], rel=FROZEN[policy]), (want, got)
    assert losses(eight)[0] == pytest.approx(losses(single)[0], rel=FIRST_LOSS)
    assert held_out_error(eight) == pytest.approx(held_out_error(single), rel=FROZEN[policy])
    assert (eight / "sample_000002.png").exists() == (policy == "nvfp4_frozen")


@pytest.mark.parametrize("policy", [pytest.param("none", marks=pytest.mark.slow), "nvfp4_frozen"])
def test_resumed_equals_uninterrupted_and_the_base_stays(data_dir, tmp_path, policy, capsys):
    before = weights_fingerprint(data_dir / "checkpoint")
    settings = (ONE_DEVICE, f"quant.policy={policy}", "loop.accumulate=2", "lora.dropout=0.1")
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    assert run(command(data_dir, uninterrupted, *settings, "loop.steps=4")) == 0
    for steps in (2, 4):
        assert run(command(data_dir, resumed, *settings, f"loop.steps={steps}")) == 0
    text = capsys.readouterr().out
    assert "Resumed from step 2" in text and "has changed" not in text

    # 1. The same losses and the same adapter, bit for bit.
    assert losses(resumed) == losses(uninterrupted) and len(losses(resumed)) == 4
    adapters = [load_adapter(f"{workdir}-out") for workdir in (resumed, uninterrupted)]
    chex.assert_trees_all_equal(*(adapter.branches for adapter in adapters))
    assert all(np.any(x != 0) for x in adapters[0].factors.values())

    # 2. The base is as before; checkpoints have none of it, but its fingerprint.
    assert weights_fingerprint(data_dir / "checkpoint") == before
    size = sum(x.size for x in jax.tree.leaves(adapters[0].branches))
    about = next((resumed / "state").rglob("about/*"))
    assert '"frozen": {"base"' in about.read_text()
    stored = sum(p.stat().st_size for p in (resumed / "state" / "4").rglob("*") if p.is_file())
    assert stored < 4 * 4 * size + 2e5  # parameters, EMA and two moments

    # 3. The export says what it is for.
    assert f"longlive sample --checkpoint={data_dir / 'checkpoint'} --adapter={resumed}-out" in text
    assert adapters[0].base == weights_fingerprint(data_dir / "checkpoint", "dit")
    assert adapters[0].rank == 4 and adapters[0].settings["solver"] == "sde"
    assert set(read_manifest(f"{resumed}-out")["components"]) == {"lora"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lora.rank=65", "config.lora.rank 65 is above the 64 of blocks/"),
        ("lora.rank=0", "lora.rank must be >= 1, got 0"),
        ("lora.targets=blocks/fnn/.*", "config.lora.targets: no kernel matches 'blocks/fnn/.*'"),
        ("lora.targets=.*kernel", "matches kernels of head, patch_embedding, text_embedding, "),
        ("lora.dropout=1.0", "lora.dropout must be in [0, 1), got 1.0"),
        ("quant.policy=nvfp4_train", "config.quant.policy nvfp4_train is not for frozen matrices"),
        ("quant.policy=nvfp4", "choose 'nvfp4_frozen', 'fp8' or 'none' with lora"),
        (
            "quant.policy=fp8,mesh.data=1,mesh.fsdp=8,mesh.sp=1,batch=8",
            "64 over 8 devices must be a multiple of 16 each",
        ),
    ],
)
def test_bad_settings_are_refused_in_one_line(data_dir, tmp_path, capsys, change, message):
    assert run(command(data_dir, tmp_path / "run", ONE_DEVICE, change)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "run/state").exists()


def test_a_packed_model_is_refused_as_the_base(data_dir, tmp_path, capsys):
    packed = tmp_path / "packed"
    source = f"--checkpoint={data_dir / 'checkpoint'}"
    assert run(["quantize", source, f"--out={packed}", "--policy=fp8"]) == 0
    changes = (ONE_DEVICE, f"checkpoint={packed}")
    assert run(command(data_dir, tmp_path / "run", *changes)) == 2
    assert "its DiT is packed; train the adapter on the checkpoint" in capsys.readouterr().err
