"""The recipe for own clips: a folder of videos in, a checkpoint that samples out."""

import json
import shutil

import pytest

from longlive_jax.cli.app import run
from longlive_jax.io.builtin import builtin_checkpoint
from longlive_jax.io.checkpoint import CHECKPOINT_MANIFEST, read_manifest
from longlive_jax.sampling.settings import spec_for
from longlive_jax.training import loop
from tests.longlive_jax.data.clips.videos import write_video

RECIPE = "--config=own_clips"
TINY = [
    "loop.steps=2", "loop.log_every=1", "batch=2", "cut.chunks=2", "cut.windows=1",
    "sampling.steps=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A flat folder: two clips, one of them with words the built-in model does not know."""
    folder = tmp_path_factory.mktemp("own") / "clips"
    for i, caption in enumerate(("a red circle moves left", "a zebra gallops left")):
        write_video(folder / f"clip{i}.mp4", 32, size=(64, 80))
        (folder / f"clip{i}.txt").write_text(caption + "\n")
    return folder


def command(folder, *options):
    overrides = [f"--config.{setting}" for setting in TINY]
    return ["train", RECIPE, *overrides, f"--workdir={folder / 'w'}", f"--out={folder / 'ck'}",
            *options]  # fmt: skip


def test_own_clips_train_a_checkpoint_that_samples(clips, tmp_path, capsys):
    # 1. Train: the videos are encoded once, and the export is complete.
    assert run(command(tmp_path, f"--config.videos={clips}")) == 0
    text = capsys.readouterr().out
    assert "captions: the text encoder does not know the words 'zebra', 'gallops'; all" in text
    assert "vae, umt5, tokenizer.model (" in text and "MB as hard links" in text
    checkpoint = tmp_path / "ck"
    assert f"longlive sample --checkpoint={checkpoint}" in text
    spec, manifest = spec_for(checkpoint), read_manifest(checkpoint)
    assert (spec.size, spec.chunk_frames, spec.window) == ((64, 64), 4, 4)
    assert (spec.solver, spec.steps, spec.guidance) == ("sde", 2, 2.0)
    assert manifest["provenance"]["dit"]["stage"] == "clips"
    changed = {k: v != read_manifest(builtin_checkpoint())["arrays"][k]
               for k, v in manifest["arrays"].items()}  # fmt: skip
    assert changed == {"vae": False, "umt5": False, "dit": True}
    # 2. Again: neither encoded nor trained again.
    stored = (tmp_path / "w" / "clips" / "clips-00000.array_record").stat().st_mtime_ns
    assert run(command(tmp_path, f"--config.videos={clips}")) == 0
    assert (tmp_path / "w" / "clips" / "clips-00000.array_record").stat().st_mtime_ns == stored
    assert "Resumed from step 2" in capsys.readouterr().out
    # 3. Sample from it.
    script = tmp_path / "shots.yaml"
    script.write_text("shots: [{prompt: a red circle moves left, chunks: 1}]")
    out = tmp_path / "out"
    assert run(["sample", f"--checkpoint={checkpoint}", f"--script={script}", f"--out={out}"]) == 0
    assert (out / "video.mp4").stat().st_size > 0


def test_an_adapter_trains_on_own_clips_and_samples(clips, tmp_path, capsys):
    # 1. Train over the built-in model in NVFP4; the folder gets the adapter alone.
    adapter, options = tmp_path / "ck", [f"--config.videos={clips}", "--config.lora.rank=4"]
    train = command(tmp_path, *options, "--config.quant.policy=nvfp4_frozen")
    train[1] = f"{RECIPE}:lora"
    assert run(train) == 0
    text = capsys.readouterr().out
    assert "LoRA of rank 4 on 40 matrices" in text and "frozen, nvfp4_frozen: 40 of 47" in text
    assert f"adapter in {adapter}" in text and f"--adapter={adapter} --script=SCRIPT" in text
    assert set(read_manifest(adapter)["components"]) == {"lora"}
    # 2. Sample with it.
    script, out = tmp_path / "shots.yaml", tmp_path / "out"
    script.write_text("shots: [{prompt: a red circle moves left, chunks: 1}]")
    assert run(["sample", f"--adapter={adapter}", f"--script={script}", f"--out={out}"]) == 0
    assert (out / "video.mp4").stat().st_size > 0


@pytest.fixture
def no_training(monkeypatch):
    def train(*_, **__):
        raise AssertionError("nothing may be trained")

    monkeypatch.setattr(loop, "train", train)


@pytest.mark.usefixtures("no_training")
def test_mistakes_are_told_before_training(clips, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.mp4").write_bytes(b"x")
    long = ["--config.cut.chunks=9", "--config.cut.pad=false"]
    for options, message in (
        ([], "config.videos is not set; give a folder of clips with captions"),
        ([f"--config.videos={tmp_path / 'none'}"], "no such dataset"),
        ([f"--config.videos={empty}"], "not a dataset; expected"),
        ([f"--config.videos={tmp_path / 'text'}"], "a.mp4: has no caption; expected one of a.txt"),
        ([f"--config.videos={clips}", *long], "too short: fills 2 of 9 chunks"),
        (["--config.checkpoint=nowhere"], "checkpoint 'nowhere' is not a directory"),
        (["--config.cut.chunk=4"], "config.cut: unknown key 'chunk'"),
    ):
        assert run(command(tmp_path / str(len(message)), *options)) == 2
        error = capsys.readouterr().err
        assert message in error, error
        assert error.count("longlive:") == 1


@pytest.mark.usefixtures("no_training")
def test_mistakes_of_the_vae_recipe(clips, tmp_path, capsys):
    folders = [f"--workdir={tmp_path / 'w'}", f"--out={tmp_path / 'ck'}"]
    videos, long = f"--config.videos={clips}", "[{'steps':400,'batch':1,'frames':41}]"
    for options, message in (
        ([], "config.videos is not set"),
        ([videos, "--config.size=(60,64)"], "config.size must be multiples of 32, got (60, 64)"),
        ([videos, f"--config.phases={long}"], "a shot must have >= 41 frames at 24 fps"),
        ([videos, "--config.model.res_blocks=1"], "set either model (a new VAE) or checkpoint"),
    ):
        assert run(["train", f"{RECIPE}:vae", *folders, *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


@pytest.mark.usefixtures("no_training")
def test_damaged_base_is_found_before_training(clips, tmp_path, capsys):
    base = shutil.copytree(builtin_checkpoint(), tmp_path / "base")
    manifest = json.loads((base / CHECKPOINT_MANIFEST).read_text())
    arrays = manifest["arrays"]["umt5"]
    name = next(iter(arrays))
    arrays[name] = arrays[name][:-8] + "00000000"
    (base / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest))
    options = (f"--config.videos={clips}", f"--config.checkpoint={base}")
    assert run(command(tmp_path, *options)) == 2
    assert f"{name} has changed on disk" in capsys.readouterr().err
    (base / "tokenizer.model").unlink()
    assert run(command(tmp_path, *options)) == 2
    assert "has no tokenizer yet" in capsys.readouterr().err
    assert not (tmp_path / "w" / "clips").exists()
