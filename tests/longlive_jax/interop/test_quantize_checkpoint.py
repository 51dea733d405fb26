"""Packing a checkpoint gives the bits of packing its parameters, and writes nothing on errors."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from longlive_jax.interop.quantize_checkpoint import LoraSpec, quantize_checkpoint
from longlive_jax.io.checkpoint import (
    CHECKPOINT_MANIFEST,
    load_component,
    read_manifest,
    save_component,
)
from longlive_jax.io.models import load_model
from longlive_jax.io.packed_kernels import read_quantization
from longlive_jax.models.params import params_of
from longlive_jax.models.wan import DiTConfig
from longlive_jax.quant.packed import PackedKernel, quantize_params
from longlive_jax.quant.policy import named
from longlive_jax.spec import UserError
from tests.random_dit import random_dit

DIT = DiTConfig(
    dim=32, ffn_dim=48, freq_dim=8, text_dim=8, text_len=4, heads=2, layers=2,
    in_channels=4, out_channels=4,
)  # fmt: skip
NVFP4 = named("nvfp4")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A checkpoint with a DiT, another component, a tokenizer and sampling settings."""
    folder = tmp_path_factory.mktemp("dense") / "ck"
    _, params = random_dit(DIT)
    save_component(folder, "dit", params, DIT, provenance={"stage": "ar"})
    save_component(folder, "other", {"x": np.arange(3.0)}, {"kind": "other"})
    manifest = json.loads((folder / CHECKPOINT_MANIFEST).read_text())
    (folder / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest | {"sampling": {"steps": 2}}))
    (folder / "tokenizer.model").write_bytes(b"words")
    return folder


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    """The same checkpoint, packed."""
    out = tmp_path_factory.mktemp("packed") / "ck"
    report = quantize_checkpoint(dense, out, NVFP4)
    assert report.bytes_after < 0.6 * report.bytes_before
    return out


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA file with two adapters of rank 2 in PEFT's naming."""
    rng, tensors = np.random.default_rng(0), {}
    for layer in range(2):
        for module, (inputs, outputs) in (("self_attn.q", (32, 32)), ("ffn.2", (48, 32))):
            prefix = f"base_model.model.blocks.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = rng.normal(size=(2, inputs)).astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = rng.normal(size=(outputs, 2)).astype(np.float32)
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file(tensors, path)
    return path


def bits(tree):
    """The bytes of every leaf, by path."""
    return {
        jax.tree_util.keystr(keys): np.asarray(leaf).tobytes()
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


@pytest.mark.parametrize("name", ["nvfp4", "fp8", "nvfp4_train"])
def test_packing_a_checkpoint_equals_packing_its_parameters(dense, tmp_path, name):
    quantize_checkpoint(dense, tmp_path / "ck", named(name), dtype="float32")
    got = params_of(load_model(tmp_path / "ck", "dit"))
    want = quantize_params(params_of(load_model(dense, "dit")), named(name))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert bits(got) == bits(want)


def test_other_components_and_settings_are_copied(dense, packed):
    manifest, before = read_manifest(packed), read_manifest(dense)
    assert manifest["sampling"] == {"steps": 2}
    assert manifest["arrays"]["other"] == before["arrays"]["other"]
    assert (packed / "tokenizer.model").read_bytes() == b"words"
    np.testing.assert_array_equal(load_component(packed, "other")[0]["x"], np.arange(3.0))
    assert manifest["components"]["dit"] == before["components"]["dit"]
    assert manifest["provenance"]["dit"]["from"] == {"stage": "ar"}


def test_only_packed_kernels_and_their_formats_are_stored(packed):
    record, arrays = read_quantization(packed), read_manifest(packed)["arrays"]["dit"]
    assert record.policy == "nvfp4" and len(record.kernels) == 10
    assert {(k.weights, k.tile, k.activations) for k in record.kernels.values()} == {
        ("mse", 1, "mse")
    }
    assert arrays["blocks.ffn.up.kernel.codes"].startswith("uint8[2,48,16]")
    assert arrays["blocks.ffn.up.kernel.scales"].startswith("float8_e4m3fn[2,48,2]")
    assert arrays["blocks.ffn.up.kernel.amax"].startswith("float32[2]")
    assert not any(x.endswith("blocks.ffn.up.kernel") for x in arrays)
    assert arrays["head.linear.kernel"].startswith("bfloat16")


def test_a_lora_is_merged_before_packing(dense, lora, tmp_path):
    from longlive_jax.interop.lora_file import LoraFile

    out = tmp_path / "ck"
    quantize_checkpoint(dense, out, NVFP4, lora=LoraSpec(lora, "merge", 4.0), dtype="float32")
    params, adapters = params_of(load_model(dense, "dit")), LoraFile.open(lora, alpha=4.0)
    for names in (("self_attn", "q"), ("ffn", "down")):
        linear = params["blocks"][names[0]][names[1]]
        path = ("blocks", *names, "kernel")
        layers = [adapters.merged(path, i, np.asarray(x)) for i, x in enumerate(linear["kernel"])]
        linear["kernel"] = jnp.stack(layers)
    got = params_of(load_model(out, "dit"))
    assert bits(got) == bits(quantize_params(params, NVFP4))
    assert read_quantization(out).merged_lora == lora.name


def test_a_lora_can_be_stored_as_a_branch(dense, packed, lora, tmp_path):
    """Adding it while packing, or to a packed checkpoint, gives the same bits."""
    branch = LoraSpec(lora, "branch", 4.0)
    for name, source in (("a", dense), ("b", packed)):
        quantize_checkpoint(source, tmp_path / name, NVFP4, lora=branch)
    first, second = (params_of(load_model(tmp_path / name, "dit")) for name in "ab")
    assert bits(first) == bits(second)
    kernel = first["blocks"]["ffn"]["down"]["kernel"]
    plain = params_of(load_model(packed, "dit"))["blocks"]["ffn"]["down"]["kernel"]
    assert isinstance(kernel, PackedKernel) and kernel.branch.scale == 2.0
    assert bits(kernel.weight) == bits(plain.weight)
    assert first["blocks"]["ffn"]["up"]["kernel"].branch is None
    assert kernel.branch.b.shape == (2, 2, 32) and kernel.branch.a.dtype == jnp.bfloat16
    assert read_quantization(tmp_path / "a").branch_lora == lora.name


def narrow(folder):
    """A checkpoint whose widths are not multiples of 16."""
    cfg = DiTConfig(
        dim=24, ffn_dim=32, freq_dim=8, text_dim=8, heads=2, layers=1, in_channels=4, out_channels=4
    )
    save_component(folder, "dit", random_dit(cfg)[1], cfg)
    return folder


def test_errors_are_raised_before_anything_is_written(dense, packed, lora, tmp_path):
    out, foreign = tmp_path / "out", tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "weights.bin").write_bytes(b"x")
    merge = LoraSpec(lora, "merge")
    cases = {
        "split into blocks of 16": (narrow(tmp_path / "narrow"), NVFP4, None),
        "is packed by nvfp4": (packed, named("fp8"), None),
        "is packed already": (packed, NVFP4, merge),
        "not a longlive-jax checkpoint": (foreign, NVFP4, None),
        "no such checkpoint directory": (tmp_path / "nowhere", NVFP4, None),
        "packs nothing": (dense, named("none"), None),
    }
    for message, (source, policy, adapters) in cases.items():
        with pytest.raises(UserError, match=message):
            quantize_checkpoint(source, out, policy, lora=adapters)
        assert not out.exists(), message
    with pytest.raises(UserError, match="is the checkpoint itself"):
        quantize_checkpoint(dense, dense, NVFP4)
    with pytest.raises(UserError, match="other files"):
        quantize_checkpoint(dense, foreign, NVFP4)
    assert [p.name for p in foreign.iterdir()] == ["weights.bin"]


def test_a_changed_array_is_detected_and_nothing_is_written(dense, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dense, copy)
    manifest = json.loads((copy / CHECKPOINT_MANIFEST).read_text())
    fingerprints = manifest["arrays"]["dit"]
    name = "blocks.ffn.down.kernel"
    fingerprints[name] = fingerprints[name].partition(":")[0] + ":00000000"
    (copy / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"blocks\.ffn\.down\.kernel has changed on disk"):
        quantize_checkpoint(copy, tmp_path / "out", NVFP4)
    assert not (tmp_path / "out").exists()


def no_record(manifest):
    del manifest["quantization"]


def other_kind(manifest):
    manifest["quantization"]["dit"]["kernels"]["blocks/ffn/up/kernel"]["kind"] = "fp8"


def one_kernel_less(manifest):
    del manifest["quantization"]["dit"]["kernels"]["blocks/ffn/up/kernel"]


def unknown_rule(manifest):
    manifest["quantization"]["dit"]["kernels"]["blocks/ffn/up/kernel"]["weights"] = "best"


def no_kernels(manifest):
    manifest["quantization"]["dit"]["kernels"] = {}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (no_record, "is not in the record"),
        (other_kind, "instead of float8_e4m3fn"),
        (one_kernel_less, "blocks/ffn/up/kernel/amax is not in the record"),
        (unknown_rule, "'best' is not one of"),
        (no_kernels, "names no kernels"),
    ],
)
def test_a_record_that_does_not_match_the_arrays_is_refused(packed, tmp_path, edit, message):
    """Before an array is read: there are no array files here."""
    copy = tmp_path / "copy"
    (copy / "dit").mkdir(parents=True)
    manifest = json.loads((packed / CHECKPOINT_MANIFEST).read_text())
    edit(manifest)
    (copy / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        load_model(copy, "dit")


def test_replacing_a_packed_component_removes_its_record(packed, dense, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    params, _ = load_component(dense, "dit")
    save_component(copy, "dit", params, DIT, overwrite=True)
    assert read_quantization(copy) is None
    load_model(copy, "dit")
