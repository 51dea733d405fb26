"""Conversion in and out by the command: sampling settings, missing parts, weights with NaN."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs.sample_5b import NEGATIVE_PROMPT as RECIPE_PROMPT
from longlive_jax.captions import NEGATIVE_PROMPT
from longlive_jax.cli.app import run
from longlive_jax.interop.finite import check_finite
from longlive_jax.io.checkpoint import (
    CHECKPOINT_MANIFEST,
    load_component,
    read_manifest,
    save_component,
)
from longlive_jax.io.parts import SETTINGS_FILE
from longlive_jax.models.wan import DiTConfig
from longlive_jax.sampling.kinds import KINDS, kind_of
from longlive_jax.sampling.settings import spec_for
from longlive_jax.spec import UserError
from tests.random_dit import random_dit
from tests.tiny import TINY, write_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def packable(checkpoint, tmp_path_factory):
    """The checkpoint with a DiT whose widths are multiples of 16."""
    folder = tmp_path_factory.mktemp("packable") / "checkpoint"
    shutil.copytree(checkpoint, folder)
    settings = read_manifest(folder)["components"]["dit"]
    cfg = DiTConfig(**settings | {"dim": 32, "ffn_dim": 48, "text_dim": 12, "layers": 1})
    save_component(folder, "dit", random_dit(cfg)[1], cfg, overwrite=True)
    return folder


@pytest.fixture(scope="module")
def original(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("original") / "weights"
    assert run(["export", f"--source={checkpoint}", f"--out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def diffusers(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("diffusers") / "weights"
    command = ["export", f"--source={checkpoint}", f"--out={out}", "--naming=diffusers"]
    assert run(command) == 0
    return out


@pytest.fixture
def foreign(original, tmp_path):
    """Weights as they come from elsewhere: without our sampling settings."""
    folder = shutil.copytree(original, tmp_path / "weights")
    (folder / SETTINGS_FILE).unlink()
    return folder


# --- Sampling settings ---


def test_base_model_is_not_sampled_like_a_distilled_one(foreign, tmp_path, capsys):
    out = tmp_path / "ck"
    assert run(["convert", f"--source={foreign}", f"--out={out}"]) == 0
    spec = spec_for(out)
    assert (spec.steps, spec.guidance, spec.shift, spec.solver) == (50, 5.0, 5.0, "unipc")
    assert spec.negative_prompt == NEGATIVE_PROMPT == RECIPE_PROMPT
    text = capsys.readouterr().out
    assert "sampling settings: base (50 steps, guidance 5, solver unipc), detected" in text
    assert "change it with --kind" in text and "--config=ar_5b before" in text


@pytest.mark.parametrize(
    ("kind", "steps", "guidance"), [("ar", 50, 3.0), ("distilled", 4, 1.0), ("two_step", 2, 1.0)]
)
def test_kind_sets_steps_and_guidance(original, tmp_path, kind, steps, guidance):
    out, file = tmp_path / "ck", original / "diffusion_pytorch_model.safetensors"
    assert run(["convert", f"--source={file}", f"--out={out}", f"--kind={kind}"]) == 0
    assert (spec_for(out).steps, spec_for(out).guidance) == (steps, guidance)


def test_exported_settings_come_back(original, diffusers, tmp_path, capsys):
    for source in (original, diffusers):
        out = tmp_path / source.parent.name
        assert run(["convert", f"--source={source}", f"--out={out}"]) == 0
        assert read_manifest(out)["sampling"] == {k: list(v) if k == "size" else v
                                                  for k, v in TINY.items()}  # fmt: skip
        assert "those of the exported checkpoint (2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "entry", "is_packed", "kind"),
    [
        ("Wan2.2-TI2V-5B/diffusion_pytorch_model.safetensors.index.json", "", False, "base"),
        ("LongLive-2.0-5B/model_bf16.pt", "generator", False, "distilled"),
        ("LongLive-2.0-5B-NVFP4-S4/model_4o6.pt", "generator", True, "distilled"),
        ("LongLive-2.0-5B-NVFP4-S2/model_4o6.pt", "generator", True, "two_step"),
        ("logs/checkpoint_model_000600/model.pt", "generator_ema", False, "ar"),
    ],
)
def test_kinds_are_detected(tmp_path, path, entry, is_packed, kind):
    assert kind_of(tmp_path / path, entry=entry, is_packed=is_packed) == kind


def test_component_alone_keeps_the_settings(foreign, tmp_path, capsys):
    out = tmp_path / "ck"
    assert run(["convert", f"--source={foreign}", f"--out={out}", "--kind=ar"]) == 0
    command = ["convert", f"--source={foreign / 'Wan2.2_VAE.safetensors'}", f"--out={out}"]
    assert run([*command, "--overwrite"]) == 0
    assert "unchanged, as no DiT was converted" in capsys.readouterr().out
    assert spec_for(out).guidance == 3.0


def test_missing_parts_are_told_after_a_conversion(foreign, tmp_path, capsys):
    out = tmp_path / "ck"
    file = foreign / "diffusion_pytorch_model.safetensors"
    assert run(["convert", f"--source={file}", f"--out={out}"]) == 0
    text = capsys.readouterr().out
    assert f"{out} has no VAE and no text encoder and no tokenizer yet" in text
    # Commands that need them say so before anything is loaded.
    script = out.parent / "shots.yaml"
    script.write_text("shots: [{prompt: a cat runs, chunks: 1}]")
    for command in (
        ["sample", f"--checkpoint={out}", f"--script={script}", f"--out={tmp_path / 'o'}"],
        ["evaluate", f"--checkpoint={out}", f"--out={tmp_path / 'e'}"],
    ):
        assert run(command) == 2
        error = capsys.readouterr().err
        assert "has no VAE and no text encoder" in error and error.count("\n") == 1


def test_damaged_settings_file(original, tmp_path, capsys):
    source = shutil.copytree(original, tmp_path / "weights")
    for text, message in (("{", "not valid JSON"), ('{"stepz": 4}', "did you mean 'steps'?")):
        (source / SETTINGS_FILE).write_text(text)
        assert run(["convert", f"--source={source}", f"--out={tmp_path / 'ck'}"]) == 2
        error = capsys.readouterr().err
        assert SETTINGS_FILE in error and message in error and error.count("\n") == 1
    assert not (tmp_path / "ck").exists()


def test_packing_keeps_and_changes_settings(packable, tmp_path, capsys):
    command = ["quantize", f"--checkpoint={packable}", "--policy=fp8"]
    assert run([*command, f"--out={tmp_path / 'a'}"]) == 0
    assert spec_for(tmp_path / "a") == spec_for(packable)
    assert run([*command, f"--out={tmp_path / 'b'}", "--kind=ar", "--kv=nvfp4"]) == 0
    spec = spec_for(tmp_path / "b")
    assert (spec.steps, spec.guidance, spec.kv, spec.size) == (50, 3.0, "nvfp4", (64, 32))
    assert "50 steps, guidance 3, solver unipc, nvfp4 KV cache" in capsys.readouterr().out


def test_packing_changes_settings_with_names_of_earlier_versions(packable, tmp_path):
    old = shutil.copytree(packable, tmp_path / "old")
    manifest = read_manifest(old)
    manifest["sampling"]["chunk"] = manifest["sampling"].pop("chunk_frames")
    (old / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest))
    out = tmp_path / "out"
    command = ["quantize", f"--checkpoint={old}", f"--out={out}", "--policy=fp8", "--kv=nvfp4"]
    assert run(command) == 0
    assert (spec_for(out).chunk_frames, spec_for(out).kv) == (TINY["chunk_frames"], "nvfp4")


def test_kinds_of_the_command_are_those_of_the_table():
    from longlive_jax.cli import convert

    assert tuple(KINDS) == convert.KINDS


# --- Weights that are not finite ---


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_values_that_are_not_finite_are_counted(dtype):
    import ml_dtypes

    value = np.ones((3, 5), getattr(ml_dtypes, dtype, dtype))
    assert check_finite(value, "w", "here") is value
    value[1, 2] = value[2, 2] = np.nan
    with pytest.raises(UserError, match="here: w has 2 of 15 values that are NaN or infinite"):
        check_finite(value, "w", "here")


def test_conversion_refuses_nan_and_names_the_array(foreign, tmp_path, capsys):
    file = foreign / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["blocks.1.ffn.0.weight"][3, 4] = np.inf
    save_file(tensors, file)
    out = tmp_path / "ck"
    assert run(["convert", f"--source={foreign}", f"--out={out}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # below the progress bar
    assert error.startswith("longlive: ") and "blocks.1.ffn.0.weight has 1 of" in error
    assert not out.exists()


@pytest.mark.parametrize("path", [("blocks", "ffn", "up", "kernel"), ("head", "modulation")])
def test_packing_and_export_refuse_nan(packable, tmp_path, capsys, path):
    broken = shutil.copytree(packable, tmp_path / "broken")
    params, settings = load_component(broken, "dit")
    node = params
    for key in path[:-1]:
        node = node[key]
    value = np.array(node[path[-1]])
    value.flat[-1] = np.nan
    node[path[-1]] = value
    save_component(broken, "dit", params, settings, overwrite=True)
    for verb, option in (("quantize", "--checkpoint"), ("export", "--source")):
        out = tmp_path / verb
        options = ["--policy=fp8"] if verb == "quantize" else []
        assert run([verb, f"{option}={broken}", f"--out={out}", *options]) == 2
        error = capsys.readouterr().err
        assert f"{'.'.join(path)} has 1 of" in error and not out.exists()


# --- A pipeline of diffusers ---

CLASSES = {
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
ARGUMENTS = {
    "transformer": {
        "patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels",
        "text_dim", "freq_dim", "ffn_dim", "num_layers", "cross_attn_norm", "qk_norm", "eps",
        "rope_max_seq_len",
    },
    "vae": {
        "base_dim", "decoder_base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales",
        "temperal_downsample", "latents_mean", "latents_std", "is_residual", "in_channels",
        "out_channels", "patch_size", "scale_factor_temporal", "scale_factor_spatial",
    },
}  # fmt: skip
"""Arguments of the constructors in diffusers 0.42 that describe weights."""


def read_json(path):
    return json.loads(path.read_text())


def test_diffusers_folder_is_a_pipeline(diffusers):
    """The values are those of a folder that `WanPipeline.from_pretrained` loaded and sampled."""
    index = read_json(diffusers / "model_index.json")
    assert index["_class_name"] == "WanPipeline" and index["expand_timesteps"] is True
    assert {name: index[name] for name in CLASSES} == CLASSES
    assert index["transformer_2"] == [None, None] and index["boundary_ratio"] is None
    for name, arguments in ARGUMENTS.items():
        config = read_json(diffusers / name / "config.json")
        assert config["_class_name"] == CLASSES[name][1]
        assert arguments <= set(config) and set(config) - arguments <= {"_class_name", "text_len"}
        assert (diffusers / name / "diffusion_pytorch_model.safetensors").is_file()
    assert (diffusers / "text_encoder" / "model.safetensors").is_file()
    assert read_json(diffusers / "text_encoder" / "config.json")["model_type"] == "umt5"
    scheduler = read_json(diffusers / "scheduler" / "scheduler_config.json")
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 5.0}
    solver = {"solver_order": 2, "solver_type": "bh2", "final_sigmas_type": "zero"}
    assert (
        flow.items() | solver.items()
        <= {k: v for k, v in scheduler.items() if not isinstance(v, list)}.items()
    )


def test_diffusers_tokenizer(diffusers, checkpoint):
    folder = diffusers / "tokenizer"
    assert (folder / "spiece.model").read_bytes() == (checkpoint / "tokenizer.model").read_bytes()
    config = read_json(folder / "tokenizer_config.json")
    tokens = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    assert config["tokenizer_class"] == "T5Tokenizer" and config["extra_ids"] == 0
    assert tokens.items() <= config.items()
    assert read_json(folder / "special_tokens_map.json") == tokens


def test_part_of_a_pipeline_has_no_index(checkpoint, tmp_path, capsys):
    (tmp_path / "part").mkdir()
    params, settings = load_component(checkpoint, "vae")
    save_component(tmp_path / "part", "vae", params, settings)
    out = tmp_path / "out"
    command = ["export", f"--source={tmp_path / 'part'}", f"--out={out}", "--naming=diffusers"]
    assert run(command) == 0
    assert not (out / "model_index.json").exists() and not (out / "scheduler").exists()
    assert "no pipeline" in (text := capsys.readouterr().out) and "has no text encoder" in text
