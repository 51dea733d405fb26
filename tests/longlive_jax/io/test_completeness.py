"""Parts of a checkpoint: missing, damaged, of different models, or linked from another one."""

import json
import os
import shutil

import numpy as np
import pytest

from longlive_jax.io.checkpoint import (
    CHECKPOINT_MANIFEST,
    TOKENIZER,
    CheckpointWriter,
    load_component,
    read_manifest,
    save_component,
)
from longlive_jax.io.completeness import (
    check_arrays,
    describe_missing,
    missing_parts,
    require_components,
)
from longlive_jax.io.parts import add_parts, parts_to_add
from longlive_jax.spec import Failure, UserError

WIDTHS = {
    "dit": {"in_channels": 4, "text_dim": 8},
    "vae": {"z_dim": 4},
    "umt5": {"dim": 8, "vocab_size": 64},
}


@pytest.fixture(scope="module")
def tokenizer():
    from longlive_jax.small_world.tokenizer import world_tokenizer

    return world_tokenizer().model


def write(folder, tokenizer, **changes):
    """A directory with the manifest of a complete model, and one small array per component."""
    for name, settings in WIDTHS.items():
        params = {"layer": {"kernel": np.arange(6, dtype=np.float32)}}
        save_component(folder, name, params, settings | changes.get(name, {}))
    (folder / TOKENIZER).write_bytes(tokenizer)
    return folder


@pytest.fixture
def folder(tmp_path, tokenizer):
    return write(tmp_path / "base", tokenizer)


def remove(folder, name):
    manifest = read_manifest(folder)
    for section in ("components", "arrays", "provenance"):
        manifest[section].pop(name, None)
    (folder / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest))


def test_complete_checkpoint(folder):
    assert require_components(folder)["components"].keys() == WIDTHS.keys()
    assert missing_parts(folder) == () and describe_missing(folder) == ""


def test_missing_parts_are_named_with_the_command_that_makes_them(folder):
    remove(folder, "vae")
    (folder / TOKENIZER).unlink()
    with pytest.raises(UserError) as error:
        require_components(folder)
    assert str(error.value) == (
        f"{folder}: has no VAE and no tokenizer yet; make them with `longlive convert "
        f"--source=WEIGHTS --out={folder}`"
    )
    require_components(folder, "dit", "umt5")


def test_parts_of_the_small_world_come_from_its_stages(folder):
    manifest = read_manifest(folder)
    manifest["provenance"]["vae"] = {"stage": "vae"}
    (folder / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest))
    for name in ("umt5", "dit"):
        remove(folder, name)
    (folder / TOKENIZER).unlink()
    text = describe_missing(folder)
    assert text.startswith("has no text encoder and no tokenizer and no DiT yet")
    stages = [word for word in text.split() if word.startswith("--config=")]
    assert stages == ["--config=small_world:text", "--config=small_world:ar"]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vae", {"z_dim": 48}, "the DiT takes 4 latent channels, the VAE has 48"),
        ("umt5", {"dim": 4096}, "takes text features of width 8, the text encoder has 4096"),
        ("umt5", {"vocab_size": 5}, "the text encoder embeds 5"),
    ],
)
def test_parts_of_different_models(tmp_path, tokenizer, part, change, message):
    with pytest.raises(UserError, match=message):
        require_components(write(tmp_path / "ck", tokenizer, **{part: change}))


def test_folder_of_a_component_is_gone(folder):
    shutil.rmtree(folder / "umt5")
    with pytest.raises(UserError, match="incomplete, the folder 'umt5' is missing"):
        require_components(folder)


def test_damaged_arrays_are_found(folder):
    check_arrays(folder, "dit", "vae", "umt5")
    manifest = read_manifest(folder)
    manifest["arrays"]["vae"]["layer.kernel"] = "float32[6]:00000000"
    (folder / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"vae: layer.kernel has changed on disk"):
        check_arrays(folder, "vae")


def added(folder, out):
    names = parts_to_add(folder, out, without="dit")
    with CheckpointWriter(out, overwrite=True) as writer:
        report = add_parts(writer, folder, names)
        writer.commit()
    return report


def test_parts_are_linked(folder, tmp_path):
    report = added(folder, tmp_path / "out")
    assert report.names == ("vae", "umt5", TOKENIZER)
    assert report.linked > 1000 and report.copied == 0 and "MB as hard links" in str(report)
    assert (tmp_path / "out" / TOKENIZER).samefile(folder / TOKENIZER)
    params, settings = load_component(tmp_path / "out", "vae")
    assert settings == WIDTHS["vae"] and params["layer"]["kernel"].tolist() == [0, 1, 2, 3, 4, 5]
    # Nothing is left to do, and the base itself is never touched.
    assert parts_to_add(folder, tmp_path / "out", without="dit") == ()
    assert parts_to_add(folder, folder, without="dit") == ()


def test_parts_are_copied_across_file_systems(folder, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    report = added(folder, tmp_path / "out")
    assert report.linked == 0 and report.copied > 1000 and "MB as copies" in str(report)
    assert (tmp_path / "out" / TOKENIZER).read_bytes() == (folder / TOKENIZER).read_bytes()
    check_arrays(tmp_path / "out", "vae", "umt5")


def test_full_disk_while_copying(folder, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copyfile", refuse)
    with pytest.raises(Failure, match=r"No space left on device.*free some space"):
        added(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_of_another_model_are_not_replaced(folder, tmp_path, tokenizer):
    other = write(tmp_path / "other", tokenizer, vae={"z_dim": 8})
    with pytest.raises(UserError, match=f"its vae is not that of {folder}"):
        parts_to_add(folder, other, without="dit")
