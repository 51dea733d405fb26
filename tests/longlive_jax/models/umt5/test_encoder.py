"""UMT5 against the reference and against transformers, and its position buckets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.interop.keys_umt5 import ORIGINAL, TRANSFORMERS, config_of
from longlive_jax.models.params import abstract, params_of, with_params
from longlive_jax.models.umt5 import UMT5, UMT5Config
from longlive_jax.models.umt5.encoder import relative_buckets

SMALL = UMT5Config(vocab_size=50, dim=24, dim_attn=32, ffn_dim=40, heads=4, layers=3)


def module_from(table, tensors, **settings):
    """A UMT5 with the tensors of a state dict."""
    leaves = table.forward({key: value.shape for key, value in tensors.items()})
    cfg = config_of({leaf.path: leaf.shape for leaf in leaves}, **settings)
    graphdef, shapes = abstract(lambda: UMT5(cfg, rngs=nnx.Rngs(0)))
    flat = {}
    for leaf in leaves:
        layers = [leaf.to_param(np.asarray(tensors[key])) for key in leaf.keys]
        flat[leaf.path] = jnp.asarray(np.stack(layers) if leaf.rule.stacked else layers[0])
    params = jax.tree_util.tree_map_with_path(
        lambda path, _: flat[tuple(key.key for key in path)], shapes
    )
    return with_params(graphdef, params)


def relative_error(got, want):
    return np.abs(np.asarray(got, np.float32) - want).max() / np.abs(want).max()


@pytest.fixture(scope="module")
def golden(goldens):
    with np.load(goldens / "umt5_encoder.npz") as z:
        return {key: z[key] for key in z.files}


@pytest.fixture(scope="module")
def weights(golden):
    return {key.removeprefix("w/"): golden[key] for key in golden if key.startswith("w/")}


@pytest.fixture(scope="module")
def small():
    return UMT5(SMALL, rngs=nnx.Rngs(0))


@jax.jit
def run(umt5, ids, mask):
    return umt5(ids, mask)


def test_equals_the_reference(golden, weights):
    umt5 = module_from(ORIGINAL, weights)
    got = run(umt5, jnp.asarray(golden["ids"]), jnp.asarray(golden["mask"] > 0))
    assert got.dtype == jnp.float32
    assert relative_error(got, golden["y"]) < 1e-5


def test_equals_transformers(fixtures):
    safetensors = pytest.importorskip("safetensors.numpy")
    folder = fixtures / "diffusers"
    umt5 = module_from(
        TRANSFORMERS, safetensors.load_file(folder / "text_encoder" / "model.safetensors")
    )
    with np.load(folder / "text_encoder_expected.npz") as z:
        ids, mask, want = z["ids"], z["mask"], z["y"] * z["mask"][..., None]
    got = run(umt5, jnp.asarray(ids), jnp.asarray(mask > 0))
    assert relative_error(got, want) < 1e-5


def test_bfloat16_is_close_to_float32(golden, weights):
    half = {key: value.astype(jnp.bfloat16) for key, value in weights.items()}
    umt5 = module_from(ORIGINAL, half, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    got = run(umt5, jnp.asarray(golden["ids"]), jnp.asarray(golden["mask"] > 0))
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, golden["y"]) < 0.06


@pytest.mark.parametrize("length", [2, 40, 512])
def test_buckets_equal_integer_arithmetic(length):
    """8 + floor(8 log16(n / 8)) for 32 buckets up to 128: the largest i with n^8 >= 8^8 16^i."""
    got = relative_buckets(length, 32, 128)
    for distance in range(length):
        far = max((i for i in range(8) if distance**8 >= 8**8 * 16**i), default=0)
        want = distance if distance < 8 else 8 + far
        assert got[distance, 0] == want, distance  # the key is before the query
        assert got[0, distance] == want + 16 * (distance > 0), distance


def test_buckets_equal_a_literal_table():
    want = [[0, 5, 6, 6], [1, 0, 5, 6], [2, 1, 0, 5], [2, 2, 1, 0]]
    np.testing.assert_array_equal(relative_buckets(4, 8, 16), want)


def test_padding_has_no_effect_and_is_zero(small):
    ids = jnp.asarray([[7, 9, 3, 1, 0, 0, 0], [7, 9, 3, 1, 4, 4, 4]])
    mask = jnp.arange(7)[None] < jnp.asarray([[4], [4]])
    padded = run(small, ids, mask)
    alone = run(small, ids[:1, :4], mask[:1, :4])
    assert not padded[:, 4:].any()
    np.testing.assert_allclose(padded[:, :4], jnp.repeat(alone, 2, 0), atol=1e-5)


def test_each_layer_has_its_own_position_table(small):
    table = small.blocks.pos_embedding.embedding[...]
    assert table.shape == (3, 32, 4)
    ids, mask = jnp.asarray([[5, 6, 7, 1]]), jnp.ones((1, 4), bool)
    for layer in range(3):
        params = params_of(small)
        params["blocks"]["pos_embedding"]["embedding"] = table.at[layer].add(
            jnp.arange(32.0)[:, None]
        )
        changed = run(with_params(small, params), ids, mask)
        assert jnp.abs(changed - run(small, ids, mask)).max() > 1e-3


def test_wrong_shapes_are_errors(small):
    with pytest.raises(Exception, match="mask"):
        small(jnp.ones((1, 4), jnp.int32), jnp.ones((1, 5), bool))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"heads": 5}, "multiple of heads"),
        ({"buckets": 6}, "buckets"),
        ({"max_distance": 8}, "max"),
    ],
)
def test_inconsistent_configs_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        UMT5Config(**settings)


def test_the_full_encoder_traces_without_allocation():
    cfg = UMT5Config(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    graphdef, params = abstract(lambda: UMT5(cfg, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 5_680_910_336
    ids = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 512), bool)
    out = jax.eval_shape(lambda p, i, m: with_params(graphdef, p)(i, m), params, ids, mask)
    assert (out.shape, out.dtype) == ((1, 512, 4096), jnp.bfloat16)
