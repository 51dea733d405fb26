"""LongLive's packed checkpoint: read, said to be wrong where it is, and written bit for bit."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from longlive_jax.cli.app import run
from longlive_jax.interop.convert import convert
from longlive_jax.interop.export import PACKED, export
from longlive_jax.interop.safetensors_file import Outgoing
from longlive_jax.interop.tensors import LazyTensor
from longlive_jax.interop.torch_file import read_torch
from longlive_jax.interop.torch_writer import write_torch
from longlive_jax.io.checkpoint import MANIFEST, load_component
from longlive_jax.io.models import load_model
from longlive_jax.io.packed_kernels import record_of
from longlive_jax.layout import grid
from longlive_jax.models.params import params_of, with_params
from longlive_jax.spec import UserError

NAME = "longlive_model_4o6.pt"
Q = "model.blocks.0.self_attn.q.quantized_weight_"


@pytest.fixture(scope="module")
def folder(fixtures, tmp_path_factory):
    """The fixture, converted."""
    out = tmp_path_factory.mktemp("released") / "ck"
    (done,) = convert(fixtures / NAME, out, heads=2, text_len=6)
    assert (done.component, done.config["layers"]) == ("dit", 2)
    return out


def kernels(dit):
    """Packed kernels by their original names."""
    theirs = {"up": "0", "down": "2"}
    return {
        f"{part}.{theirs.get(name, name)}": linear["kernel"]
        for part in ("self_attn", "cross_attn", "ffn")
        for name, linear in params_of(dit)["blocks"][part].items()
        if "kernel" in linear
    }


def test_weights_are_the_reference_s(fixtures, folder):
    """Equal as numbers; a code of -0 stays -0 here, where the reference's table makes it 0."""
    packed = kernels(load_model(folder, "dit"))
    want = np.load(fixtures / "longlive_model_4o6_dequantized.npz")
    assert len(want.files) == 20
    for name in want.files:
        _, layer, *module, _ = name.split(".")
        got = packed[".".join(module)].dequantized(jnp.float32)[int(layer)].T
        np.testing.assert_array_equal(np.asarray(got) + 0.0, want[name])
        assert got.dtype == want[name].dtype


def test_saved_again_it_is_the_same(fixtures, folder, tmp_path):
    """Codes, scales, amax, metadata, everything else and the values around, bit for bit."""
    (path,) = export(folder, tmp_path / "out", "original")
    assert path.name == PACKED
    want, got = read_torch(fixtures / NAME), read_torch(path)
    theirs, ours = want.pop("generator"), got.pop("generator")
    assert got == want and set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert (ours[key].shape, ours[key].dtype) == (tensor.shape, tensor.dtype), key
        assert ours[key].read().tobytes() == tensor.read().tobytes(), key
    convert(tmp_path / "out", tmp_path / "again", text_len=6)  # config.json says the heads
    assert prints(tmp_path / "again") == prints(folder)


def prints(folder):
    return json.loads((folder / MANIFEST).read_text())["arrays"]["dit"]


def test_it_computes(folder):
    dit, x = load_model(folder, "dit", param_dtype=np.float32), jnp.ones((1, 2, 4, 4, 8))

    @jax.jit
    def velocity(params):
        model = with_params(dit, params)
        text = model.text_kv(jnp.ones((1, 1, 6, 24)))
        return model(x, jnp.full((1, 2), 500.0), text, grid(2, 2, 2, chunk_frames=2))[0]

    y = velocity(params_of(dit))
    assert y.shape == x.shape and bool(jnp.isfinite(y).all())


def test_the_type_of_parts_is_no_choice(fixtures, tmp_path):
    convert(fixtures / NAME, tmp_path / "ck", heads=2, dtype="float32")
    params, _ = load_component(tmp_path / "ck", "dit", dtype="float16")
    q = params["blocks"]["self_attn"]["q"]
    assert q["bias"].dtype == jnp.float16
    kinds = {name: part.dtype.name for name, part in q["kernel"].items()}
    assert kinds == {"codes": "uint8", "scales": "float8_e4m3fn", "amax": "float32"}


def changed(fixtures, target, edit):
    """The fixture with `edit(state, around)` done to it, arrays in the place of tensors."""
    around = read_torch(fixtures / NAME)
    state = {key: tensor.read() for key, tensor in around.pop("generator").items()}
    edit(state, around)
    tensors = {k: Outgoing(x.shape, x.dtype, lambda x=x: x) for k, x in state.items()}
    write_torch(target, {"generator": tensors, **around})
    return target


def test_a_scalar_amax_is_the_same(fixtures, folder, tmp_path):
    """As the reference's other back ends export it."""

    def scalar(state, _):
        for key in state:
            if key.endswith("amax"):
                state[key] = state[key].reshape(())

    convert(changed(fixtures, tmp_path / "a.pt", scalar), tmp_path / "ck", heads=2, text_len=6)
    assert prints(tmp_path / "ck") == prints(folder)


def put(key, value):
    return lambda state, _: state.update({f"{Q}{key}": value})


def take(key):
    return lambda state, _: state.pop(f"{Q}{key}")


def around(*path, value):
    def edit(_, values):
        for key in path[:-1]:
            values = values.setdefault(key, {})
        values[path[-1]] = value

    return edit


def dirty(state, _):
    state[f"{Q}values"] = state[f"{Q}values"].copy()
    state[f"{Q}values"][100, 3] = 1


WRONG = {
    "sizes": (put("metadata", np.array([64, 128, 128, 128], np.int32)), "its metadata says"),
    "blocks": (put("metadata", np.array([64, 56, 128, 64], np.int32)), "in blocks of 16"),
    "padding": (put("metadata", np.array([64, 64, 64, 64], np.int32)), "instead of (128, 64)"),
    "metadata": (put("metadata", np.zeros(3, np.int32)), "four whole numbers"),
    "type": (put("scale_factors", np.zeros(512, np.uint8)), "float8_e4m3fn"),
    "amax": (put("amax", np.zeros(2, np.float32)), "amax is float32"),
    "lacking": (take("amax"), "without quantized_weight_amax"),
    "dirty": (dirty, "padding is not zero"),
    "format": (around("checkpoint_format", value="other"), "checkpoint_format"),
    "version": (around("checkpoint_version", value=2), "checkpoint_version"),
    "kind": (around("quantization", "format", value="mxfp4"), "quantization.format"),
    "rule": (around("quantization", "weight_scale_rule", value="best"), "scale rule 'best'"),
    "tiles": (around("quantization", "rules", "weight_scale_2d", value=True), "16x16 blocks"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_one_line(fixtures, tmp_path, capsys, case):
    edit, said = WRONG[case]
    path, out = changed(fixtures, tmp_path / "a.pt", edit), tmp_path / "ck"
    assert run(["convert", f"--source={path}", f"--out={out}", "--heads=2"]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert said in err[-1] and err[-1].startswith("longlive: ")
    assert not out.exists()


def test_rules_are_the_file_s(fixtures, tmp_path):
    edit = around("quantization", "rules", value={"scale_rule": "static_6"})
    convert(changed(fixtures, tmp_path / "a.pt", edit), tmp_path / "ck", heads=2)
    record = record_of(tmp_path / "ck")
    assert {(k.weights, k.activations, k.tile) for k in record.kernels.values()} == {
        ("static_6", "static_6", 1)
    }


def test_a_lora_cannot_be_merged_into_it(fixtures, tmp_path):
    with pytest.raises(UserError, match="cannot be merged into packed weights"):
        convert(fixtures / NAME, tmp_path / "ck", heads=2, merge_lora=fixtures / "longlive_lora.pt")
    assert not (tmp_path / "ck").exists()


def test_it_has_no_diffusers_names(folder, tmp_path):
    with pytest.raises(UserError, match="say --naming=original"):
        export(folder, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


def test_odd_sizes_are_padded_and_cut():
    """24 x 48: rows to 128, columns to 64, scales in the order of tensor cores."""
    from longlive_jax.interop import released

    rng = np.random.default_rng(0)
    parts = {
        "codes": rng.integers(0, 255, (24, 24), np.uint8),
        "scales": rng.random((24, 3)).astype(ml_dtypes.float8_e4m3fn),
        "amax": np.array(2.5, np.float32),
    }
    made = released.tensors_of("m", (24, 48), parts.__getitem__)
    lazy = {key: LazyTensor(t.shape, t.dtype, t.make) for key, t in made.items()}
    assert lazy["m.quantized_weight_values"].shape == (128, 32)
    np.testing.assert_array_equal(lazy["m.quantized_weight_metadata"].read(), [24, 48, 128, 64])
    again = released.parts_of(lazy, "here")
    for name, part in released.PARTS.items():
        got = again[f"m.quantized_weight_{name}"]
        assert got.shape == parts[part].shape
        assert got.read().tobytes() == parts[part].tobytes()
