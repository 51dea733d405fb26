"""Key tables are invertible, and report all problems at once."""

import numpy as np
import pytest

from longlive_jax.interop import keys_dit, keys_lora, keys_umt5, keys_vae
from longlive_jax.interop.components import COMPONENTS, expected_shapes
from longlive_jax.interop.export import slice_shape
from longlive_jax.interop.keytable import KeyRule, KeyTable
from longlive_jax.interop.transforms import TRANSFORMS
from longlive_jax.io.arrays import flatten
from longlive_jax.models.umt5 import UMT5Config
from longlive_jax.models.vae import VAEConfig
from longlive_jax.models.wan import DiTConfig

SMALL = {
    "dit": DiTConfig(
        dim=32, ffn_dim=48, freq_dim=16, text_dim=20, heads=2, layers=3, in_channels=4
    ),
    "vae": VAEConfig(
        encoder_dim=4, decoder_dim=8, z_dim=4, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4
    ),
    "umt5": UMT5Config(vocab_size=10, dim=8, dim_attn=12, ffn_dim=20, heads=2, layers=2),
}
TABLES = [
    ("dit", keys_dit.ORIGINAL),
    ("dit", keys_dit.DIFFUSERS),
    ("vae", keys_vae.ORIGINAL),
    ("vae", keys_vae.DIFFUSERS),
    ("umt5", keys_umt5.ORIGINAL),
    ("umt5", keys_umt5.TRANSFORMERS),
]
TENSOR_SHAPES = {
    "identity": (3, 4),
    "linear": (3, 4),
    "conv2d": (2, 3, 4, 5),
    "conv3d": (2, 3, 4, 5, 6),
    "pointwise2d": (2, 3, 1, 1),
    "pointwise3d": (2, 3, 1, 1, 1),
    "time_conv": (4, 2, 3, 1, 1),
    "patch_embedding": (6, 3, 1, 2, 2),
    "gamma2d": (5, 1, 1),
    "gamma3d": (5, 1, 1, 1),
    "drop_first": (1, 6, 4),
}
TOY = KeyTable(
    "toy",
    (
        KeyRule("blocks.{layer}.{m:q|k}.weight", "blocks.{m}.kernel", "linear"),
        KeyRule("alias.{layer}.q", "blocks.q.kernel", "linear"),
        KeyRule("norm.weight", "norm.scale"),
    ),
    ignore=("junk.{rest:.*}",),
)


@pytest.mark.parametrize(("name", "table"), TABLES)
def test_tables_are_bijective_on_the_models(name, table):
    shapes = expected_shapes(COMPONENTS[name], SMALL[name])
    state = {}
    for leaf in table.backward(shapes):
        tensor = leaf.to_tensor(np.broadcast_to(np.zeros((), np.uint8), slice_shape(leaf)))
        state |= dict.fromkeys(leaf.keys, tensor.shape)
    leaves = table.forward(state, expected=shapes)
    assert {leaf.path: leaf.shape for leaf in leaves} == shapes
    assert sum(len(leaf.keys) for leaf in leaves) == len(state)


def test_the_lora_table_is_invertible():
    shapes = {("blocks", "ffn", "up", "a"): (2, 8, 4), ("blocks", "ffn", "up", "b"): (2, 4, 16)}
    keys = [key for leaf in keys_lora.PEFT.backward(shapes) for key in leaf.keys]
    assert keys[0] == "base_model.model.blocks.0.ffn.0.lora_A.weight"
    state = {key: (4, 8) if "lora_A" in key else (16, 4) for key in keys}
    assert {leaf.path: leaf.shape for leaf in keys_lora.PEFT.forward(state)} == shapes


@pytest.mark.parametrize(("name", "shape"), TENSOR_SHAPES.items())
def test_inverse_undoes_forward(name, shape):
    x = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(TRANSFORMS[name].inverse(TRANSFORMS[name].forward(x)), x)


def test_every_transform_is_tested():
    assert TENSOR_SHAPES.keys() == TRANSFORMS.keys()


def test_patch_embedding_orders_rows_by_patch_row_column_and_channel():
    """The channel varies fastest."""
    x = np.arange(2 * 3 * 4).reshape(2, 3, 1, 2, 2)
    kernel = TRANSFORMS["patch_embedding"].forward(x)
    assert kernel.shape == (12, 2)
    assert kernel[(1 * 2 + 0) * 3 + 2, 1] == x[1, 2, 0, 1, 0]


def test_all_problems_are_reported_at_once():
    state = {
        "blocks.0.q.weight": (3, 4),
        "blocks.2.q.weight": (3, 4),  # layer 1 is missing
        "alias.0.q": (3, 4),  # duplicate of the first key
        "blocks.0.k.weight": (3, 4),
        "blocks.1.k.weight": (4, 3),  # another shape
        "blocks.2.k.weight": (3,),  # not a matrix
        "surprise": (1,),
        "junk.left.over": (9,),
    }
    expected = {
        ("blocks", "q", "kernel"): (3, 4, 3),
        ("blocks", "k", "kernel"): (3, 4, 3),
        ("norm", "scale"): (4,),
    }
    with pytest.raises(ValueError) as error:
        TOY.forward(state, expected=expected)
    message = str(error.value)
    assert "2 missing: blocks.1.q.weight, norm.weight" in message
    assert "1 extra: surprise" in message
    assert "1 duplicate: alias.0.q (same leaf as blocks.0.q.weight)" in message
    assert "2 misshapen" in message
    assert "junk" not in message


def test_long_reports_are_shortened_and_huge_layer_numbers_are_harmless():
    with pytest.raises(ValueError, match=r"20 extra: .* and 12 more"):
        TOY.forward({f"x{i}": (1,) for i in range(20)})
    with pytest.raises(ValueError, match="missing"):
        TOY.forward({"blocks.123456789012.q.weight": (2, 2)})


def test_invalid_rules_are_refused():
    with pytest.raises(ValueError, match="unknown transform 'flip'"):
        KeyRule("a", "b", "flip")
    with pytest.raises(ValueError, match="fields differ"):
        KeyRule("a.{m:x|y}", "b")


def test_number_of_parameters_of_the_5b_model():
    shapes = expected_shapes(COMPONENTS["dit"], DiTConfig())
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 4_999_787_712
    assert len(keys_dit.ORIGINAL.backward(shapes)) == len(shapes)
    vae = expected_shapes(COMPONENTS["vae"], VAEConfig())
    assert sum(int(np.prod(shape)) for shape in vae.values()) == 704_688_668
    assert flatten({}) == {}
