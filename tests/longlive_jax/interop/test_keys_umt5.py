"""Key tables of the UMT5 encoder match the files, in both namings."""

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
    """Parameter shapes of an encoder by path."""
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
        tensors |= {k: leaf.to_tensor(x) for k, x in zip(leaf.keys, layers, strict=True)}
    leaves = table.forward({k: x.shape for k, x in tensors.items()}, expected=shapes)
    assert {leaf.path for leaf in leaves} == set(shapes)
    for leaf in leaves:
        layers = [leaf.to_param(tensors[key]) for key in leaf.keys]
        got = layers if leaf.rule.stacked else layers[0]
        np.testing.assert_array_equal(got, values[leaf.path])


def test_tables_match_the_files(goldens, fixtures):
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
        keys = [key for leaf in table.backward(leaves) for key in leaf.keys]
        assert sorted(keys) == sorted(shapes)


def test_a_second_copy_of_the_embedding_is_ignored():
    keys = {key for leaf in TRANSFORMERS.backward(shapes_of(CFG)) for key in leaf.keys}
    assert TRANSFORMERS.ignores("encoder.embed_tokens.weight")
    assert "encoder.embed_tokens.weight" not in keys


def test_config_of_other_weights_names_the_missing_array():
    with pytest.raises(ValueError, match="token_embedding/embedding is missing"):
        config_of({("patch_embedding", "kernel"): (4, 4)})


def test_wans_file_survives_a_round_trip_bit_for_bit(fixtures):
    """This file has no expected output; `test_encoder` checks the outputs in this naming."""
    tensors = {key: x.read() for key, x in read_torch(fixtures / "umt5_bf16.pth").items()}
    leaves = ORIGINAL.forward({key: x.shape for key, x in tensors.items()})
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    cfg = config_of(shapes, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert shapes == shapes_of(cfg)
    restored = {}
    for leaf in leaves:
        for key in leaf.keys:
            restored[key] = leaf.to_tensor(leaf.to_param(tensors[key]))
    assert set(restored) == set(tensors)
    for key, value in tensors.items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(restored[key].view(np.uint16), value.view(np.uint16))
