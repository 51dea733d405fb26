"""LongLive's packed checkpoint: reading, exact export, and errors for damaged files."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from longlive_jax.cli.app import run
from longlive_jax.interop.convert import convert
from longlive_jax.interop.export import RELEASED_FILE, export
from longlive_jax.interop.safetensors_file import OutputTensor
from longlive_jax.interop.tensors import LazyTensor
from longlive_jax.interop.torch_file import read_torch
from longlive_jax.interop.torch_writer import write_torch
from longlive_jax.io.checkpoint import CHECKPOINT_MANIFEST, load_component
from longlive_jax.io.models import load_model
from longlive_jax.io.packed_kernels import read_quantization
from longlive_jax.layout import grid
from longlive_jax.models.params import params_of, with_params
from longlive_jax.spec import UserError

NAME = "longlive_model_4o6.pt"
Q = "model.blocks.0.self_attn.q.quantized_weight_"


@pytest.fixture(scope="module")
def folder(fixtures, tmp_path_factory):
    """The fixture, converted."""
    out = tmp_path_factory.mktemp("released") / "ck"
    (item,) = convert(fixtures / NAME, out, heads=2, text_len=6)
    assert (item.component, item.config["layers"]) == ("dit", 2)
    return out


def kernels(dit):
    """Packed kernels by their original names."""
    original_names = {"up": "0", "down": "2"}
    return {
        f"{module}.{original_names.get(name, name)}": linear["kernel"]
        for module in ("self_attn", "cross_attn", "ffn")
        for name, linear in params_of(dit)["blocks"][module].items()
        if "kernel" in linear
    }


def test_dequantized_weights_equal_the_reference(fixtures, folder):
    """Equal as numbers: the code of -0 stays -0 here, and becomes 0 in the reference's table."""
    packed = kernels(load_model(folder, "dit"))
    want = np.load(fixtures / "longlive_model_4o6_dequantized.npz")
    assert len(want.files) == 20
    for name in want.files:
        _, layer, *module, _ = name.split(".")
        got = packed[".".join(module)].dequantized(jnp.float32)[int(layer)].T
        np.testing.assert_array_equal(np.asarray(got) + 0.0, want[name])
        assert got.dtype == want[name].dtype


def test_an_export_equals_the_original_file(fixtures, folder, tmp_path):
    """All tensors bit for bit, and the metadata."""
    (path,) = export(folder, tmp_path / "out", "original")
    assert path.name == RELEASED_FILE
    want, got = read_torch(fixtures / NAME), read_torch(path)
    want_tensors, got_tensors = want.pop("generator"), got.pop("generator")
    assert got == want and set(got_tensors) == set(want_tensors)
    for key, tensor in want_tensors.items():
        assert (got_tensors[key].shape, got_tensors[key].dtype) == (tensor.shape, tensor.dtype), key
        assert got_tensors[key].read().tobytes() == tensor.read().tobytes(), key
    convert(tmp_path / "out", tmp_path / "again", text_len=6)  # heads are in config.json
    assert fingerprints(tmp_path / "again") == fingerprints(folder)


def fingerprints(folder):
    return json.loads((folder / CHECKPOINT_MANIFEST).read_text())["arrays"]["dit"]


def test_a_packed_dit_has_finite_outputs(folder):
    dit, x = load_model(folder, "dit", param_dtype=np.float32), jnp.ones((1, 2, 4, 4, 8))

    @jax.jit
    def velocity(params):
        model = with_params(dit, params)
        text = model.text_kv(jnp.ones((1, 1, 6, 24)))
        return model(x, jnp.full((1, 2), 500.0), text, grid(2, 2, 2, chunk_frames=2))[0]

    y = velocity(params_of(dit))
    assert y.shape == x.shape and bool(jnp.isfinite(y).all())


def test_packed_arrays_are_never_cast(fixtures, tmp_path):
    convert(fixtures / NAME, tmp_path / "ck", heads=2, dtype="float32")
    params, _ = load_component(tmp_path / "ck", "dit", dtype="float16")
    q = params["blocks"]["self_attn"]["q"]
    assert q["bias"].dtype == jnp.float16
    dtypes = {name: array.dtype.name for name, array in q["kernel"].items()}
    assert dtypes == {"codes": "uint8", "scales": "float8_e4m3fn", "amax": "float32"}


def edited(fixtures, target, edit):
    """A copy of the fixture, changed by `edit(arrays, metadata)`."""
    metadata = read_torch(fixtures / NAME)
    arrays = {key: tensor.read() for key, tensor in metadata.pop("generator").items()}
    edit(arrays, metadata)
    tensors = {k: OutputTensor(x.shape, x.dtype, lambda x=x: x) for k, x in arrays.items()}
    write_torch(target, {"generator": tensors, **metadata})
    return target


def test_a_scalar_amax_is_accepted(fixtures, folder, tmp_path):
    """The reference's other back ends export it as a scalar."""

    def scalar(state, _):
        for key in state:
            if key.endswith("amax"):
                state[key] = state[key].reshape(())

    convert(edited(fixtures, tmp_path / "a.pt", scalar), tmp_path / "ck", heads=2, text_len=6)
    assert fingerprints(tmp_path / "ck") == fingerprints(folder)


def set_array(name, value):
    return lambda arrays, _: arrays.update({f"{Q}{name}": value})


def remove_array(name):
    return lambda arrays, _: arrays.pop(f"{Q}{name}")


def set_metadata(*path, value):
    def edit(_, metadata):
        for key in path[:-1]:
            metadata = metadata.setdefault(key, {})
        metadata[path[-1]] = value

    return edit


def nonzero_padding(arrays, _):
    arrays[f"{Q}values"] = arrays[f"{Q}values"].copy()
    arrays[f"{Q}values"][100, 3] = 1


DAMAGED = {
    "sizes": (set_array("metadata", np.array([64, 128, 128, 128], np.int32)), "its metadata says"),
    "blocks": (set_array("metadata", np.array([64, 56, 128, 64], np.int32)), "in blocks of 16"),
    "multiples": (
        set_array("metadata", np.array([64, 64, 64, 64], np.int32)),
        "instead of (128, 64)",
    ),
    "metadata": (set_array("metadata", np.zeros(3, np.int32)), "must be four integers"),
    "dtype": (set_array("scale_factors", np.zeros(512, np.uint8)), "float8_e4m3fn"),
    "amax": (set_array("amax", np.zeros(2, np.float32)), "amax is float32"),
    "missing": (remove_array("amax"), "quantized_weight_amax missing"),
    "padding": (nonzero_padding, "padding is not zero"),
    "format": (set_metadata("checkpoint_format", value="other"), "checkpoint_format"),
    "version": (set_metadata("checkpoint_version", value=2), "checkpoint_version"),
    "no dictionary": (set_metadata("quantization", value="nvfp4"), "must be a dictionary, got str"),
    "kind": (set_metadata("quantization", "format", value="mxfp4"), "quantization.format"),
    "rule": (set_metadata("quantization", "weight_scale_rule", value="best"), "scale rule 'best'"),
    "tiles": (set_metadata("quantization", "rules", "weight_scale_2d", value=True), "16x16 blocks"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_and_unsupported_files_give_one_line(fixtures, tmp_path, capsys, case):
    edit, message = DAMAGED[case]
    path, out = edited(fixtures, tmp_path / "a.pt", edit), tmp_path / "ck"
    assert run(["convert", f"--source={path}", f"--out={out}", "--heads=2"]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[-1] and err[-1].startswith("longlive: ")
    assert not out.exists()


def test_scale_rules_are_read_from_the_file(fixtures, tmp_path):
    edit = set_metadata("quantization", "rules", value={"scale_rule": "static_6"})
    convert(edited(fixtures, tmp_path / "a.pt", edit), tmp_path / "ck", heads=2)
    record = read_quantization(tmp_path / "ck")
    assert {(k.weights, k.activations, k.tile) for k in record.kernels.values()} == {
        ("static_6", "static_6", 1)
    }


def test_a_lora_cannot_be_merged_into_packed_weights(fixtures, tmp_path):
    with pytest.raises(UserError, match="cannot be merged into packed weights"):
        convert(fixtures / NAME, tmp_path / "ck", heads=2, merge_lora=fixtures / "longlive_lora.pt")
    assert not (tmp_path / "ck").exists()


def test_packed_weights_cannot_be_exported_in_diffusers_naming(folder, tmp_path):
    with pytest.raises(UserError, match="pass --naming=original"):
        export(folder, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


def test_odd_sizes_are_padded_and_restored():
    """24 x 48 is padded to 128 x 64, and the scales are swizzled."""
    from longlive_jax.interop import released

    rng = np.random.default_rng(0)
    arrays = {
        "codes": rng.integers(0, 255, (24, 24), np.uint8),
        "scales": rng.random((24, 3)).astype(ml_dtypes.float8_e4m3fn),
        "amax": np.array(2.5, np.float32),
    }
    tensors = released.to_released("m", (24, 48), arrays.__getitem__)
    lazy = {key: LazyTensor(t.shape, t.dtype, t.make) for key, t in tensors.items()}
    assert lazy["m.quantized_weight_values"].shape == (128, 32)
    np.testing.assert_array_equal(lazy["m.quantized_weight_metadata"].read(), [24, 48, 128, 64])
    restored = released.from_released(lazy, "here")
    for name, ours in released.ARRAY_NAMES.items():
        got = restored[f"m.quantized_weight_{name}"]
        assert got.shape == arrays[ours].shape
        assert got.read().tobytes() == arrays[ours].tobytes()
