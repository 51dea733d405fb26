import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.interop.keys_umt5 import ORIGINAL, TRANSFORMERS, config_of
from longlive_jax.interop.torch_file import read_torch
from longlive_jax.models.params import abstract
from longlive_jax.models.umt5 import UMT5, UMT5Config

CFG = UMT5Config(vocab_size=20, dim=12, dim_attn=16, ffn_dim=28, heads=4, layers=2)
TABLES = pytest.mark.parametrize("table", [ORIGINAL, TRANSFORMERS], ids=lambda table: table.name)


def shapes_of(cfg):
    params = abstract(lambda: UMT5(cfg, rngs=nnx.Rngs(0)))[1]
    flat = {}

    def walk(tree, path):
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, (*path, key))
            else:
                flat[(*path, key)] = value.shape

    walk(params, ())
    return flat


@TABLES
def test_names_and_values_survive_the_round_trip(table):
    shapes, rng = shapes_of(CFG), np.random.default_rng(0)
    tensors, values = {}, {}
    for leaf in table.backward(shapes):
        values[leaf.path] = rng.normal(size=leaf.shape)
        layers = values[leaf.path] if leaf.rule.stacked else [values[leaf.path]]
        tensors |= {k: leaf.extract(x) for k, x in zip(leaf.keys, layers, strict=True)}
    leaves = table.forward({k: x.shape for k, x in tensors.items()}, expected=shapes)
    assert {leaf.path for leaf in leaves} == set(shapes)
    for leaf in leaves:
        back = [leaf.place(tensors[key]) for key in leaf.keys]
        np.testing.assert_array_equal(back if leaf.rule.stacked else back[0], values[leaf.path])


def test_tables_fit_the_files(goldens, fixtures):
    safetensors = pytest.importorskip("safetensors.numpy")
    file = safetensors.load_file(fixtures / "diffusers" / "text_encoder" / "model.safetensors")
    with np.load(goldens / "umt5_encoder.npz") as z:
        original = {key.removeprefix("w/"): z[key].shape for key in z.files if key.startswith("w/")}
    for table, shapes in [
        (ORIGINAL, original),
        (TRANSFORMERS, {key: value.shape for key, value in file.items()}),
    ]:
        leaves = {leaf.path: leaf.shape for leaf in table.forward(shapes)}
        assert leaves == shapes_of(config_of(leaves))
        back = [key for leaf in table.backward(leaves) for key in leaf.keys]
        assert sorted(back) == sorted(shapes)


def test_a_repeated_embedding_is_ignored():
    keys = {key for leaf in TRANSFORMERS.backward(shapes_of(CFG)) for key in leaf.keys}
    assert TRANSFORMERS.ignores("encoder.embed_tokens.weight")
    assert "encoder.embed_tokens.weight" not in keys


def test_config_of_other_weights_says_what_is_missing():
    with pytest.raises(ValueError, match="token_embedding/embedding"):
        config_of({("patch_embedding", "kernel"): (4, 4)})


def test_wans_file_fits_and_goes_back_bit_for_bit(fixtures):
    """No expected output comes with this file; `test_encoder` checks the naming's numbers."""
    tensors = {key: x.read() for key, x in read_torch(fixtures / "umt5_bf16.pth").items()}
    leaves = ORIGINAL.forward({key: x.shape for key, x in tensors.items()})
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    cfg = config_of(shapes, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert shapes == shapes_of(cfg)
    back = {}
    for leaf in leaves:
        for key in leaf.keys:
            back[key] = leaf.extract(leaf.place(tensors[key]))
    assert set(back) == set(tensors)
    for key, value in tensors.items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(back[key].view(np.uint16), value.view(np.uint16))
