"""Conversion: the fixtures' expected outputs, bit-exact round trips, and clean errors."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from longlive_jax.bench.convert_memory import torch_zip
from longlive_jax.cli.app import run
from longlive_jax.interop.convert import convert
from longlive_jax.interop.export import export
from longlive_jax.interop.torch_file import read_torch
from longlive_jax.io.builtin import find_checkpoint
from longlive_jax.io.checkpoint import CHECKPOINT_MANIFEST, load_component, read_manifest
from longlive_jax.io.models import load_model
from longlive_jax.io.parts import MODELS_FILE
from longlive_jax.layout import grid
from longlive_jax.models import vae as vae_module
from longlive_jax.spec import UserError


def error(got, want) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())


def channels_last(x):
    return jnp.asarray(np.moveaxis(x, 1, -1))


def velocity(folder, case, *, chunk):
    """Output of a checkpoint's DiT for a case with latents `[b, c, f, h, w]`."""
    dit = load_model(folder, "dit", param_dtype=np.float32)
    x = channels_last(case["x"])
    _, frames, height, width, _ = x.shape
    t = jnp.broadcast_to(case["t"].reshape(1, -1), (1, frames)).astype(jnp.float32)
    # A single chunk is bidirectional; several clean chunks are block-causal.
    tokens = grid(frames, height // 2, width // 2, chunk_frames=chunk, noisy=chunk >= frames)
    text = dit.text_kv(jnp.asarray(case["context"])[:, None])
    return np.moveaxis(np.asarray(dit(x, t, text, tokens)[0]), -1, 1)


@pytest.fixture(scope="module")
def diffusers(fixtures, tmp_path_factory):
    """The complete diffusers folder, converted."""
    folder = tmp_path_factory.mktemp("diffusers") / "ck"
    converted = convert(fixtures / "diffusers", folder, text_len=6)
    assert [item.component for item in converted] == ["dit", "vae", "umt5"]
    return folder


def test_pytorch_is_not_imported(fixtures, tmp_path):
    import sys

    convert(fixtures / "umt5_bf16.pth", tmp_path / "ck")
    assert "torch" not in sys.modules


@pytest.mark.parametrize(
    ("name", "use_ema"),
    [
        ("longlive_model_ema.pt", True),
        ("longlive_model_ema.pt", False),
        ("dit_flat_bf16.pth", False),
    ],
)
def test_longlive_checkpoints_have_the_expected_output(fixtures, tmp_path, name, use_ema):
    convert(fixtures / name, tmp_path / "ck", heads=2, text_len=6, use_ema=use_ema)
    case = np.load(fixtures / "dit_expected.npz")
    got = velocity(tmp_path / "ck", case, chunk=int(case["num_frame_per_block"]))
    bfloat16 = load_component(tmp_path / "ck", "dit")[0]["head"]["modulation"].dtype != np.float32
    assert error(got, case["y_blockwise_causal_fp32_weights"]) < (2e-2 if bfloat16 else 1e-4)


def test_nested_and_flat_files_convert_to_the_same_arrays(fixtures, tmp_path):
    for name in ("dit_flat_bf16.pth", "longlive_model_bf16.pt"):
        convert(fixtures / name, tmp_path / name, heads=2)
    fingerprints = [
        read_manifest(tmp_path / name)["arrays"]["dit"]
        for name in ("dit_flat_bf16.pth", "longlive_model_bf16.pt")
    ]
    assert fingerprints[0] == fingerprints[1]


def test_the_diffusers_transformer_has_the_expected_output(fixtures, diffusers):
    case = np.load(fixtures / "diffusers" / "transformer_expected.npz")
    assert error(velocity(diffusers, case, chunk=3), case["y"]) < 1e-4


def test_the_diffusers_vae_has_the_expected_output(fixtures, diffusers):
    case = np.load(fixtures / "diffusers" / "vae_expected.npz")
    vae = load_model(diffusers, "vae")
    z = vae_module.encode(vae, channels_last(case["pixels"]))
    assert error(np.moveaxis(z, -1, 1), case["z"]) < 1e-4
    pixels = vae_module.decode(vae, channels_last(case["z_in"]))
    # diffusers clamps decoded pixels
    assert error(np.clip(np.moveaxis(pixels, -1, 1), -1, 1), case["pixels_out"].clip(-1, 1)) < 1e-4


def test_the_transformers_text_encoder_has_the_expected_output(fixtures, diffusers):
    case = np.load(fixtures / "diffusers" / "text_encoder_expected.npz")
    umt5 = load_model(diffusers, "umt5")
    got = umt5(jnp.asarray(case["ids"], jnp.int32), jnp.asarray(case["mask"], bool))
    assert error(got, case["y"] * case["mask"][..., None]) < 1e-4


def test_the_original_vae_and_umt5_go_into_one_checkpoint(fixtures, tmp_path):
    """Every tensor of the files is converted."""
    for name in ("vae.pth", "umt5_bf16.pth"):
        (item,) = convert(fixtures / name, tmp_path / "ck")
        tensors = read_torch(fixtures / name)
        assert item.parameters == sum(int(np.prod(t.shape)) for t in tensors.values())
    vae, _ = load_component(tmp_path / "ck", "vae")
    want = read_torch(fixtures / "vae.pth")["encoder.downsamples.1.downsamples.2.time_conv.weight"]
    got = vae["encoder"]["stages"][1]["down"]["time_conv"]["kernel"]
    np.testing.assert_array_equal(got, want.read()[..., 0, 0].transpose(2, 1, 0))
    load_model(tmp_path / "ck", "vae")
    load_model(tmp_path / "ck", "umt5")


def test_a_lora_is_converted_alone_and_merged(fixtures, tmp_path):
    base, lora = fixtures / "longlive_model_bf16.pt", fixtures / "longlive_lora.pt"
    convert(lora, tmp_path / "ck")
    adapters, config = load_component(tmp_path / "ck", "lora", dtype=np.float32)
    assert (config["rank"], config["alpha"], len(config["targets"])) == (4, 4, 10)
    convert(base, tmp_path / "ck", heads=2)
    convert(base, tmp_path / "merged", heads=2, merge_lora=lora, lora_alpha=8)
    plain, _ = load_component(tmp_path / "ck", "dit", dtype=np.float32)
    merged, _ = load_component(tmp_path / "merged", "dit", dtype=np.float32)
    a, b = (np.asarray(adapters["blocks"]["ffn"]["up"][name]) for name in "ab")
    want = np.asarray(plain["blocks"]["ffn"]["up"]["kernel"]) + 2 * a @ b
    np.testing.assert_array_equal(
        merged["blocks"]["ffn"]["up"]["kernel"],
        want.astype(ml_dtypes.bfloat16).astype(np.float32),
    )
    np.testing.assert_array_equal(merged["head"]["modulation"], plain["head"]["modulation"])
    with pytest.raises(UserError, match="is not a LoRA file"):
        convert(base, tmp_path / "x", heads=2, merge_lora=fixtures / "vae.pth")


def test_a_lora_of_another_model_is_refused(fixtures, tmp_path):
    state = {
        k: t.read() for k, t in read_torch(fixtures / "longlive_lora.pt")["generator_lora"].items()
    }
    first, second = list(state)[:2]
    state[second] = np.zeros((65, 4), ml_dtypes.bfloat16)
    state = {k: v.astype(np.float32) for k, v in state.items()}
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="misshapen"):
        convert(
            fixtures / "longlive_model_bf16.pt",
            tmp_path / "x",
            heads=2,
            merge_lora=tmp_path / "lora.safetensors",
        )
    del state[first]
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="missing"):
        convert(tmp_path / "lora.safetensors", tmp_path / "x")


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_converting_an_export_gives_the_same_bits(diffusers, tmp_path, naming):
    files = export(diffusers, tmp_path / "out", naming, shard_bytes=300_000)
    assert len(files) > 3
    convert(tmp_path / "out", tmp_path / "again")
    before, after = read_manifest(diffusers), read_manifest(tmp_path / "again")
    assert before["arrays"] == after["arrays"]
    assert before["components"] == after["components"]


def test_an_export_of_the_builtin_model_keeps_its_latent_statistics(tmp_path):
    # The original files have neither; other means would decode to other pictures.
    builtin = find_checkpoint("small_world")
    export(builtin, tmp_path / "out", "original")
    convert(tmp_path / "out", tmp_path / "again")
    before, after = read_manifest(builtin), read_manifest(tmp_path / "again")
    assert any(before["components"]["vae"]["latent_mean"])
    assert before["arrays"] == after["arrays"]
    for name, settings in after["components"].items():
        assert {key: before["components"][name].get(key) for key in settings} == settings
    # A single file of the folder has the same settings.
    convert(tmp_path / "out" / "Wan2.2_VAE.safetensors", tmp_path / "vae")
    assert read_manifest(tmp_path / "vae")["components"]["vae"] == after["components"]["vae"]


def test_an_export_keeps_settings_of_text_encoder_and_lora(fixtures, tmp_path):
    convert(fixtures / "umt5_bf16.pth", tmp_path / "ck")
    convert(fixtures / "longlive_lora.pt", tmp_path / "ck", lora_alpha=12)
    manifest = read_manifest(tmp_path / "ck")
    manifest["components"]["umt5"] |= {"eps": 0.25, "max_distance": 17}
    (tmp_path / "ck" / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest))
    export(tmp_path / "ck", tmp_path / "out", "original")
    convert(tmp_path / "out", tmp_path / "again")
    convert(tmp_path / "out" / "lora", tmp_path / "again")
    again = read_manifest(tmp_path / "again")["components"]
    assert (again["umt5"]["eps"], again["umt5"]["max_distance"]) == (0.25, 17)
    assert again["lora"]["alpha"] == 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"vae": 3}', "vae must be a JSON object"),
        ('{"vae": {"latents_mean": [0], "latents_std": [1]}}', "1 and 1 entries for z_dim"),
        ('{"vae": {"latents_mean": ["a"], "latents_std": [1]}}', "lists of finite numbers"),
        ('{"vae": {"latents_mean": [NaN], "latents_std": [1]}}', "lists of finite numbers"),
    ],
)
def test_damaged_settings_of_models(fixtures, tmp_path, text, message):
    shutil.copy(fixtures / "vae.pth", tmp_path / "vae.pth")
    (tmp_path / MODELS_FILE).write_text(text)
    with pytest.raises(UserError, match=message):
        convert(tmp_path, tmp_path / "ck")


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_git_lfs_pointers_are_named(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(UserError, match=rf"{name}: is a Git LFS pointer.*git lfs pull"):
        convert(tmp_path, tmp_path / "ck")


def test_an_export_has_the_tensors_of_the_original_files(diffusers, fixtures, tmp_path):
    """The same names, shapes, dtypes and bits as the files that were converted."""
    export(diffusers, tmp_path / "out", "diffusers")
    for folder in ("transformer", "vae", "text_encoder"):
        want, got = {}, {}
        for file in (fixtures / "diffusers" / folder).glob("*.safetensors"):
            want |= load_file(file)
        for file in (tmp_path / "out" / folder).glob("*.safetensors"):
            got |= load_file(file)
        assert set(got) == set(want)
        for name, value in want.items():
            assert got[name].dtype == value.dtype
            np.testing.assert_array_equal(got[name], value)


def test_a_bfloat16_export_has_the_original_names_and_bits(fixtures, tmp_path):
    convert(fixtures / "longlive_model_bf16.pt", tmp_path / "ck", heads=2)
    (file,) = export(tmp_path / "ck", tmp_path / "out", "original")
    want, got = read_torch(fixtures / "dit_flat_bf16.pth"), load_file(file)
    assert set(got) == set(want)
    for name, lazy in want.items():
        np.testing.assert_array_equal(got[name].view(np.uint16), lazy.read().view(np.uint16))


def test_export_refuses_existing_files_and_unknown_namings(diffusers, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        export(diffusers, tmp_path / "out", "original")
    with pytest.raises(UserError, match="longlive convert"):
        export(tmp_path / "out", tmp_path / "other", "original")
    with pytest.raises(UserError, match="original or diffusers"):
        export(diffusers, tmp_path / "other", "keras")


def test_dtype_casts_and_overwrite_replaces(fixtures, tmp_path):
    source = fixtures / "diffusers" / "text_encoder"
    convert(source, tmp_path / "ck", dtype="bfloat16")
    assert "bfloat16" in read_manifest(tmp_path / "ck")["arrays"]["umt5"]["norm.scale"]
    with pytest.raises(UserError, match="--overwrite"):
        convert(source, tmp_path / "ck")
    convert(source, tmp_path / "ck", overwrite=True)
    assert "float32" in read_manifest(tmp_path / "ck")["arrays"]["umt5"]["norm.scale"]


def test_hostile_files_leave_no_files(fixtures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path in sorted((fixtures / "hostile").iterdir()):
        assert run(["convert", f"--source={path}", f"--out={tmp_path / 'ck'}"]) == 2
        assert capsys.readouterr().err.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []


def test_hostile_files_do_not_change_an_existing_checkpoint(fixtures, diffusers, tmp_path):
    shutil.copytree(diffusers, tmp_path / "ck")
    before = {p: p.read_bytes() for p in (tmp_path / "ck").rglob("*") if p.is_file()}
    for path in sorted((fixtures / "hostile").iterdir()):
        with pytest.raises(UserError):
            convert(path, tmp_path / "ck", overwrite=True)
    assert {p: p.read_bytes() for p in (tmp_path / "ck").rglob("*") if p.is_file()} == before


def test_a_read_error_half_way_leaves_no_files(fixtures, tmp_path):
    source = tmp_path / "model.safetensors"
    shutil.copyfile(fixtures / "diffusers" / "text_encoder" / "model.safetensors", source)

    def truncate(name, done, total):
        with open(source, "r+b") as file:
            file.truncate(9_000)

    with pytest.raises(UserError, match="bytes early"):
        convert(source, tmp_path / "ck", progress=truncate)
    assert not (tmp_path / "ck").exists()


def test_unknown_settings_and_missing_weights_are_refused(fixtures, tmp_path):
    with pytest.raises(UserError, match="--heads"):
        convert(fixtures / "dit_flat_bf16.pth", tmp_path / "ck")
    with pytest.raises(UserError, match="leave out --use_ema"):
        convert(fixtures / "diffusers" / "vae" / "diffusion_pytorch_model.safetensors",
                tmp_path / "ck", use_ema=True)  # fmt: skip
    with pytest.raises(UserError, match="no weights"):
        convert(fixtures / "odd_tensors.pth", tmp_path / "ck")
    with pytest.raises(UserError, match="no such file"):
        convert(tmp_path / "nothing", tmp_path / "ck")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no weights"):
        convert(tmp_path / "empty", tmp_path / "ck")
    with pytest.raises(UserError, match=r"20 missing: .*time_embedding"):
        convert(fixtures / "legacy_format.pth", tmp_path / "ck")


def test_unwritable_outputs_are_refused(fixtures, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        convert(fixtures / "umt5_bf16.pth", tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        convert(fixtures / "umt5_bf16.pth", tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_all_bad_keys_are_reported_at_once(fixtures, tmp_path):
    state = {f"model.{k}": t.read().astype(np.float32)
             for k, t in read_torch(fixtures / "dit_flat_bf16.pth").items()}  # fmt: skip
    del state["model.blocks.1.ffn.0.bias"], state["model.head.modulation"]
    state["model.surprise"] = np.zeros(1, np.float32)
    state["model.blocks.0.self_attn.q.weight"] = np.zeros((64, 63), np.float32)
    state["model._fsdp_wrapped_module.patch_embedding.bias"] = np.zeros(64, np.float32)
    path = tmp_path / "bad.pt"
    torch_zip(path, {k: (v.shape, "FloatStorage", v.tobytes) for k, v in state.items()})
    with pytest.raises(UserError) as caught:
        convert(path, tmp_path / "ck", heads=2)
    message = str(caught.value)
    assert "2 missing: blocks.1.ffn.0.bias, head.modulation" in message
    assert "1 extra: surprise" in message
    assert "1 duplicate: model._fsdp_wrapped_module.patch_embedding.bias" in message
    assert "misshapen: blocks." in message
    assert not (tmp_path / "ck").exists()


def test_a_config_that_contradicts_the_weights_is_refused(fixtures, tmp_path):
    folder = tmp_path / "transformer"
    shutil.copytree(fixtures / "diffusers" / "transformer", folder)
    folder.chmod(0o755)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 30}))
    with pytest.raises(UserError, match="num_layers 30 instead of 2"):
        convert(folder, tmp_path / "ck")


def test_a_folder_in_wans_layout_is_converted(fixtures, tmp_path):
    """It has a sharded DiT, two .pth files, a config.json and the tokenizer's folder."""
    source = tmp_path / "Wan2.2-TI2V-5B"
    convert(fixtures / "diffusers" / "transformer", tmp_path / "ck")
    export(tmp_path / "ck", source, "original", shard_bytes=200_000)
    shutil.copyfile(fixtures / "vae.pth", source / "Wan2.2_VAE.pth")
    shutil.copyfile(fixtures / "umt5_bf16.pth", source / "models_t5_umt5-xxl-enc-bf16.pth")
    (source / "google" / "umt5-xxl").mkdir(parents=True)
    (source / "google" / "umt5-xxl" / "spiece.model").write_bytes(b"pieces")
    converted = convert(source, tmp_path / "all")
    assert {item.component for item in converted} == {"dit", "vae", "umt5"}
    assert (tmp_path / "all" / "tokenizer.model").read_bytes() == b"pieces"
    assert not list((tmp_path / "all").glob(".*"))
    shutil.copyfile(fixtures / "longlive_model_bf16.pt", source / "model_bf16.pt")
    with pytest.raises(UserError, match="are both the dit"):
        convert(source, tmp_path / "more")


def test_the_manifest_has_provenance_and_no_run_settings(diffusers):
    manifest = read_manifest(diffusers)
    assert manifest["provenance"]["dit"]["naming"] == "Wan DiT (diffusers naming)"
    assert "dtype" not in manifest["components"]["dit"]
    assert dataclasses.is_dataclass(load_model(diffusers, "dit").cfg)
