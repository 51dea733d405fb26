"""LoRA files of other programs: names, alpha and layers, and what is refused by its name."""

import json
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from longlive_jax.interop.convert import convert
from longlive_jax.interop.lora_file import LoraFile, merged
from longlive_jax.interop.lora_spec import LoraStack
from longlive_jax.io.checkpoint import load_component
from longlive_jax.spec import UserError

RANK, DIM, FFN, LAYERS = 2, 6, 8, 3
MODULES = {
    **{f"{attn}.{m}": (DIM, DIM) for attn in ("self_attn", "cross_attn") for m in "qkvo"},
    "ffn.0": (DIM, FFN),
    "ffn.2": (FFN, DIM),
}
DIFFUSERS = {
    **{f"self_attn.{m}": f"attn1.to_{m}" for m in "qkv"},
    **{f"cross_attn.{m}": f"attn2.to_{m}" for m in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
SHAPES = {
    ("blocks", attn, m, "kernel"): (LAYERS, DIM, DIM)
    for attn in ("self_attn", "cross_attn")
    for m in "qkvo"
} | {
    ("blocks", "ffn", "up", "kernel"): (LAYERS, DIM, FFN),
    ("blocks", "ffn", "down", "kernel"): (LAYERS, FFN, DIM),
}


def factors(layers=range(LAYERS)):
    """(layer, module) -> A [r, i] and B [o, r]."""
    rng = np.random.default_rng(0)
    return {
        (layer, module): (
            rng.normal(size=(RANK, inputs)).astype(np.float32),
            rng.normal(size=(outputs, RANK)).astype(np.float32),
        )
        for layer in layers
        for module, (inputs, outputs) in MODULES.items()
    }


def save(path, key, *, names=("lora_A.weight", "lora_B.weight"), layers=range(LAYERS), **options):
    """Writes a file whose keys are `key(layer, module)` and these names."""
    tensors = {}
    for (layer, module), pair in factors(layers).items():
        for name, value in zip(names, pair, strict=True):
            tensors[f"{key(layer, module)}.{name}"] = value
        if "alpha" in options:
            alpha = options["alpha"](module)
            tensors[f"{key(layer, module)}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors | options.get("more", {}), path, metadata=options.get("metadata"))
    return path


def peft(layer, module):
    return f"base_model.model.blocks.{layer}.{module}"


KEYS = {
    "peft": (peft, ("lora_A.weight", "lora_B.weight")),
    "peft with an adapter's name": (peft, ("lora_A.default.weight", "lora_B.default.weight")),
    "comfy": (lambda i, m: f"diffusion_model.blocks.{i}.{m}", ("lora_A.weight", "lora_B.weight")),
    "down and up": (lambda i, m: f"diffusion_model.blocks.{i}.{m}",
                    ("lora_down.weight", "lora_up.weight")),
    "kohya": (lambda i, m: f"lora_unet_blocks_{i}_{m.replace('.', '_')}",
              ("lora_down.weight", "lora_up.weight")),
    "diffusers": (lambda i, m: f"transformer.blocks.{i}.{DIFFUSERS[m]}",
                  ("lora_A.weight", "lora_B.weight")),
    "kohya of diffusers": (lambda i, m: f"lora_unet_blocks_{i}_{DIFFUSERS[m].replace('.', '_')}",
                           ("lora_down.weight", "lora_up.weight")),
    "bare": (lambda i, m: f"blocks.{i}.{m}", ("lora.down.weight", "lora.up.weight")),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_all_namings_give_the_same_factors(tmp_path, name):
    key, names = KEYS[name]
    file = LoraFile.open(save(tmp_path / "x.safetensors", key, names=names))
    file.check(SHAPES)
    assert len(file.specs) == 20 and file.scale == 1
    for (layer, module), (a, b) in factors().items():
        kernel = np.zeros(MODULES[module], np.float32)
        got = file.merged(path_of(module), layer, kernel)
        np.testing.assert_allclose(got, (b @ a).T, atol=1e-6)


def path_of(module):
    names = {"ffn.0": ("ffn", "up"), "ffn.2": ("ffn", "down")}.get(module, module.split("."))
    return ("blocks", *names, "kernel")


def test_alpha_of_modules_counts_before_that_of_the_file(tmp_path):
    """Modules may differ: the product of the factors does."""
    alphas = {"ffn.0": 8.0, "ffn.2": 2.0}
    path = save(
        tmp_path / "x.safetensors",
        peft,
        alpha=lambda module: alphas.get(module, 4.0),
        metadata={"ss_network_alpha": "99"},
    )
    file = LoraFile.open(path)
    for (layer, module), (a, b) in factors().items():
        got = file.merged(path_of(module), layer, np.zeros(MODULES[module], np.float32))
        want = (b @ a).T * alphas.get(module, 4.0) / RANK
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("metadata", "config", "want"),
    [
        ({"ss_network_alpha": "8"}, None, 8),
        ({"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 6}'}, None, 6),
        (None, {"r": 2, "lora_alpha": 5}, 5),
        ({"ss_network_alpha": "8"}, {"r": 2, "lora_alpha": 5}, 8),
        (None, {"r": 2, "peft_type": "LORA", "use_rslora": False, "rank_pattern": {}}, 2),
        (None, None, 2),
    ],
)
def test_where_alpha_comes_from(tmp_path, metadata, config, want):
    path = save(tmp_path / "adapter_model.safetensors", peft, metadata=metadata)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert LoraFile.open(path).alpha == LoraFile.open(tmp_path).alpha == want
    assert LoraFile.open(path, alpha=3).alpha == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_rslora": True}, "use_rslora is not read"),
        ({"use_dora": True}, "use_dora is not read"),
        ({"peft_type": "LOKR"}, "peft_type LOKR is not read"),
        ({"alpha_pattern": {"q": 3}}, "alpha_pattern is not read"),
        ({"r": 3}, "r is 3, and the rank"),
        ({"lora_alpha": "much"}, "alpha must be a number > 0"),
        ({"lora_alpha": -1}, "alpha must be a number > 0"),
    ],
)
def test_a_config_that_would_change_the_result_is_refused(tmp_path, config, message):
    path = save(tmp_path / "adapter_model.safetensors", peft)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as caught:
        LoraFile.open(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("blocks.0.ffn.0.diff_b", "1 diff .* weights are not read"),
        ("blocks.0.norm3.diff", "1 diff .* weights are not read"),
        ("blocks.0.ffn.0.dora_scale", "1 DoRA weights are not read"),
        ("base_model.model.blocks.0.ffn.0.lora_magnitude_vector.weight", "DoRA"),
        ("blocks.0.ffn.0.lokr_w1", "LoKr"),
        ("base_model.model.head.lora_A.weight", "1 extra: base_model.model.head.lora_A.weight"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(tmp_path, key, message):
    more = {key: np.zeros((RANK, DIM), np.float32)}
    path = save(tmp_path / "x.safetensors", peft, more=more)
    with pytest.raises(UserError, match=message) as caught:
        LoraFile.open(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layers", [(1, 2), (2,), (0, 1)])
def test_an_adapter_of_some_layers_leaves_the_others_alone(tmp_path, layers):
    file = LoraFile.open(save(tmp_path / "x.safetensors", peft, layers=layers))
    file.check(SHAPES)
    for layer in range(LAYERS):
        kernel = np.ones((DIM, FFN), np.float32)
        changed = file.merged(path_of("ffn.0"), layer, kernel)
        assert np.array_equal(changed, kernel) == (layer not in layers)
    convert(tmp_path / "x.safetensors", tmp_path / "ck")
    branches, config = load_component(tmp_path / "ck", "lora")
    assert branches["blocks"]["ffn"]["up"]["a"].shape == (max(layers) + 1, DIM, RANK)
    assert config["is_partial"]
    LoraFile.open(tmp_path / "ck").check(SHAPES)


def test_a_layer_number_far_away_is_damage(tmp_path):
    path = save(tmp_path / "x.safetensors", peft, layers=(0, 5000))
    with pytest.raises(UserError, match="missing"):
        LoraFile.open(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({("blocks", "ffn", "up", "kernel"): (LAYERS, 5, FFN)}, "6 inputs of blocks.ffn.up"),
        ({("blocks", "ffn", "up", "kernel"): (LAYERS, DIM, 9)}, "8 outputs of blocks.ffn.up"),
        ({path: (2, *shape[1:]) for path, shape in SHAPES.items()}, "has 3 layers, this one has 2"),
    ],
)
def test_another_models_shapes_are_refused(tmp_path, change, message):
    file = LoraFile.open(save(tmp_path / "x.safetensors", peft))
    with pytest.raises(UserError, match=f"is for another model: .*{message}"):
        file.check(SHAPES | change)


def test_several_adapters_are_summed_before_they_are_rounded(tmp_path):
    """In bfloat16, the sum of two rounded merges would be another."""
    first = LoraFile.open(save(tmp_path / "a.safetensors", peft))
    second = LoraFile.open(save(tmp_path / "b.safetensors", peft, layers=(0, 1)), alpha=3)
    kernel = np.linspace(-1, 1, DIM * FFN).reshape(DIM, FFN).astype(ml_dtypes.bfloat16)
    path = path_of("ffn.0")
    want = kernel.astype(np.float32)
    want = want + first.update(path, 0) + second.update(path, 0) * np.float32(0.5)
    got = merged([(first, 1.0), (second, 0.5)], path, 0, kernel)
    np.testing.assert_array_equal(got, want.astype(ml_dtypes.bfloat16))
    assert merged([(second, 1.0)], ("blocks", "norm", "scale"), 0, kernel) is kernel


def test_levels_do_not_outlast_the_steps_of_an_adapter():
    """Three steps at exact levels, then an adapter for two steps."""
    own = {"steps": 3, "levels": [1.0, 0.9, 0.7], "guidance": 1.0}
    files = [SimpleNamespace(info=SimpleNamespace(settings=x)) for x in (own, {"steps": 2})]
    stack = LoraStack([(file, 1.0) for file in files])
    assert stack.settings == {"steps": 2, "guidance": 1.0}
