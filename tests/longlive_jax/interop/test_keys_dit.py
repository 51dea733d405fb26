"""Key tables of the DiT cover Wan2.2-TI2V-5B, in both namings."""

import jax
import pytest
from flax import nnx

from longlive_jax.interop.keys_dit import DIFFUSERS, ORIGINAL
from longlive_jax.models.params import abstract
from longlive_jax.models.variants import variant
from longlive_jax.models.wan import DiT


@pytest.fixture(scope="module")
def shapes():
    """Parameter shapes of Wan2.2-TI2V-5B."""
    cfg = variant("wan2_2_ti2v_5b")["dit"]
    _, params = abstract(lambda: DiT(cfg, rngs=nnx.Rngs(0)))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}


@pytest.mark.parametrize("table", [ORIGINAL, DIFFUSERS], ids=lambda table: table.name)
def test_every_parameter_has_one_key_per_layer(table, shapes):
    leaves = table.backward(shapes)
    keys = [key for leaf in leaves for key in leaf.keys]
    assert len(keys) == len(set(keys)) == 15 + 30 * 27
    for key in keys:
        rule, fields = table.match(key)
        assert rule.path_of(fields) in shapes


def test_keys_are_those_of_the_published_checkpoints(shapes):
    original = {key for leaf in ORIGINAL.backward(shapes) for key in leaf.keys}
    diffusers = {key for leaf in DIFFUSERS.backward(shapes) for key in leaf.keys}
    assert {
        "patch_embedding.weight",
        "time_projection.1.bias",
        "head.modulation",
        "head.head.weight",
        "blocks.29.self_attn.norm_k.weight",
        "blocks.0.cross_attn.o.bias",
        "blocks.7.norm3.weight",
        "blocks.7.ffn.2.weight",
    } <= original
    assert {
        "condition_embedder.time_proj.weight",
        "condition_embedder.text_embedder.linear_2.bias",
        "scale_shift_table",
        "proj_out.bias",
        "blocks.3.attn2.to_out.0.weight",
        "blocks.3.norm2.bias",
        "blocks.3.scale_shift_table",
        "blocks.3.ffn.net.0.proj.weight",
    } <= diffusers
