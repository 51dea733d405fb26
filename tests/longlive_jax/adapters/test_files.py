"""Adapters in files: round trips bit for bit in all forms, and one line for what is wrong."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from longlive_jax.adapters import (
    Adapter,
    export_original,
    export_peft,
    load_adapter,
    parse_strength,
    save_adapter,
)
from longlive_jax.interop.torch_file import read_torch
from longlive_jax.io.checkpoint import CHECKPOINT_MANIFEST
from longlive_jax.models.wan import DiTConfig
from longlive_jax.spec import UserError
from tests.longlive_jax.adapters.conftest import random_adapter, same_bits
from tests.random_dit import random_dit

DIT = DiTConfig(
    dim=32, ffn_dim=48, freq_dim=8, text_dim=8, text_len=4, heads=2, layers=3,
    in_channels=4, out_channels=4,
)  # fmt: skip
SETTINGS = {"steps": 2, "shift": 5.0, "solver": "euler", "levels": (1.0, 0.75), "guidance": 1.0}


@pytest.fixture(scope="module")
def adapter():
    return random_adapter(
        random_dit(DIT)[1],
        alpha=6,
        settings=SETTINGS,
        role="generator",
        base="0123abcd",
        provenance={"step": 7},
    )


def same(adapter, other):
    """Whether two adapters are equal in all but their names."""
    names = {field.name for field in dataclasses.fields(Adapter)}
    names -= {"branches", "name", "provenance"}
    for name in names:
        assert getattr(adapter, name) == getattr(other, name)
    assert other.provenance["step"] == adapter.provenance["step"]
    equal = same_bits(adapter.branches, other.branches)
    return equal and adapter.fingerprint == other.fingerprint


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_every_form_gives_the_same_bits(adapter, tmp_path, dtype):
    """Our directory -> PEFT's folder -> the original's file -> our directory."""
    cast = {k: np.asarray(x, dtype) for k, x in adapter.factors.items()}
    first = dataclasses.replace(adapter, branches=_nested(cast))
    save_adapter(tmp_path / "ours", first)
    second = load_adapter(tmp_path / "ours")
    files = export_peft(tmp_path / "peft", second)
    third = load_adapter(tmp_path / "peft")
    export_original(tmp_path / "model.pt", generator=third, critic=first, step=7)
    last = load_adapter(tmp_path / "model.pt")
    save_adapter(tmp_path / "again", last)
    assert all(same(first, x) for x in (second, third, last, load_adapter(tmp_path / "again")))
    assert same(first, load_adapter(files[0]))
    before, after = (
        json.loads((tmp_path / name / CHECKPOINT_MANIFEST).read_text())
        for name in ("ours", "again")
    )
    assert before["arrays"] == after["arrays"] and before["components"] == after["components"]


def _nested(factors):
    tree = {}
    for path, value in factors.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def test_peft_reads_names_rank_and_alpha(adapter, tmp_path):
    export_peft(tmp_path / "peft", adapter)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 6.0)
    assert {"self_attn.q", "cross_attn.o", "ffn.0", "ffn.2"} <= set(config["target_modules"])
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    key = "base_model.model.blocks.1.ffn.2.lora_{}.weight"
    down = adapter.branches["blocks"]["ffn"]["down"]
    np.testing.assert_array_equal(tensors[key.format("A")], down["a"][1].T)
    np.testing.assert_array_equal(tensors[key.format("B")], down["b"][1].T)
    assert len(tensors) == 2 * 10 * 3


def test_the_original_finds_both_adapters(adapter, tmp_path):
    critic = dataclasses.replace(adapter, role="critic", settings={})
    export_original(tmp_path / "model.pt", generator=adapter, critic=critic, step=5000)
    contents = read_torch(tmp_path / "model.pt")
    assert contents["step"] == 5000
    for name in ("generator_lora", "critic_lora"):
        assert contents[name]["base_model.model.blocks.2.self_attn.q.lora_A.weight"].shape == (
            4,
            32,
        )
    assert load_adapter(tmp_path / "model.pt", role="critic").role == "critic"
    with pytest.raises(UserError, match="exists; choose a new file"):
        export_original(tmp_path / "model.pt", generator=adapter)


def test_a_file_of_the_original_goes_round(fixtures, tmp_path):
    ours = load_adapter(fixtures / "longlive_lora.pt")
    assert (ours.role, ours.rank, ours.scale, ours.provenance) == (
        "generator", 4, 1.0, {"step": 5000},
    )  # fmt: skip
    critic = load_adapter(fixtures / "longlive_lora.pt", role="critic")
    export_original(tmp_path / "model.pt", generator=ours, critic=critic, step=5000)
    before, after = read_torch(fixtures / "longlive_lora.pt"), read_torch(tmp_path / "model.pt")
    for name in ("generator_lora", "critic_lora"):
        assert set(before[name]) == set(after[name])
        for key, tensor in before[name].items():
            assert tensor.read().tobytes() == after[name][key].read().tobytes()
            assert tensor.dtype == after[name][key].dtype


def test_a_directory_holds_the_adapters_of_both_roles(adapter, tmp_path):
    save_adapter(tmp_path / "both", adapter)
    save_adapter(tmp_path / "both", dataclasses.replace(adapter, role="critic", scale=0.25))
    assert load_adapter(tmp_path / "both").scale == adapter.scale
    assert load_adapter(tmp_path / "both", role="critic").scale == 0.25
    with pytest.raises(UserError, match="--overwrite"):
        save_adapter(tmp_path / "both", adapter)
    save_adapter(tmp_path / "both", dataclasses.replace(adapter, scale=2.0), overwrite=True)
    assert load_adapter(tmp_path / "both").scale == 2.0


def test_a_changed_byte_is_found(adapter, tmp_path):
    save_adapter(tmp_path / "ours", adapter)
    path = tmp_path / "ours" / CHECKPOINT_MANIFEST
    manifest = json.loads(path.read_text())
    name, value = next(iter(manifest["arrays"]["lora"].items()))
    manifest["arrays"]["lora"][name] = value.partition(":")[0] + ":00000000"
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has changed on disk"):
        load_adapter(tmp_path / "ours")


def test_values_that_are_not_finite_are_refused(adapter, tmp_path):
    tensors = load_file(export_peft(tmp_path / "peft", adapter)[0])
    key = next(iter(tensors))
    tensors[key][0, 0] = np.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=rf"{key} has 1 of .* NaN"):
        load_adapter(tmp_path / "nan.safetensors")
    broken = {**adapter.factors}
    broken[("blocks", "ffn", "up", "b")] = broken[("blocks", "ffn", "up", "b")] * np.inf
    with pytest.raises(UserError, match=r"blocks\.ffn\.up\.b has"):
        save_adapter(tmp_path / "x", dataclasses.replace(adapter, branches=_nested(broken)))
    assert not (tmp_path / "x").exists()


def test_a_missing_file_and_other_kinds_are_one_line(tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors")
    cases = {"nowhere": "no such file", "text.safetensors": "damaged safetensors"}
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            load_adapter(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="got int"):
        load_adapter(3)


@pytest.mark.parametrize(
    ("text", "want"),
    [("a.pt", ("a.pt", 1.0)), ("a.pt:0.5", ("a.pt", 0.5)), ("a:b.pt:-2e-1", ("a:b.pt", -0.2))],
)
def test_path_and_strength(text, want):
    assert parse_strength(text) == want


@pytest.mark.parametrize("text", ["a.pt:strong", "a.pt:nan", "a.pt:", ":0.5", "a.pt:inf"])
def test_a_bad_strength_is_named(text):
    with pytest.raises(UserError, match="the scale must be a finite number"):
        parse_strength(text)


def test_a_path_with_a_colon_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:x").mkdir()
    assert parse_strength("a:x") == ("a:x", 1.0)
