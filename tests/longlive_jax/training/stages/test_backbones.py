"""Frozen backbones that are read layer by layer equal those that are packed at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.interop.quantize_checkpoint import quantize_checkpoint
from longlive_jax.io.checkpoint import save_component
from longlive_jax.models.params import params_of
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.parallel import rules
from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.quant.frozen import fit_shards, freeze, frozen_specs
from longlive_jax.quant.policy import named
from longlive_jax.spec import UserError
from longlive_jax.training.stages.backbones import FrozenForm, model_of, read_backbone

MODEL = DiTConfig(
    dim=64, ffn_dim=128, freq_dim=8, text_dim=8, text_len=4, heads=2, layers=2, in_channels=4,
    out_channels=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return params_of(DiT(MODEL, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def folder(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone") / "checkpoint"
    save_component(folder, "dit", params, MODEL)
    return folder


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("policy", ["none", "fp8", "nvfp4_frozen"])
def test_a_backbone_equals_the_frozen_parameters(folder, params, policy, devices):
    mesh = make_mesh(MeshSpec(fsdp=devices), jax.devices()[:devices])
    form = FrozenForm(policy=policy, gradient=True, dtype="bfloat16")
    got = read_backbone(folder, params, form, mesh)

    # 1. As if packed at once.
    axes = ("data", "fsdp", "sp") if devices > 1 else ()
    specs = rules.specs_for(rules.DIT, params)
    want = freeze(params, named(policy), gradient=True, axes=axes)
    want = fit_shards(want, specs, mesh.shape)
    if policy == "none":
        want["blocks"]["ffn"]["up"]["kernel"] = params["blocks"]["ffn"]["up"]["kernel"].astype(
            jnp.bfloat16
        )
    for names in (("blocks", "ffn", "up", "kernel"), ("blocks", "modulation")):
        nodes = got, want
        for name in names:
            nodes = tuple(node[name] for node in nodes)
        jax.tree.map(np.testing.assert_array_equal, *nodes)

    # 2. Shapes, dtypes and shardings as they are planned.
    shapes, divided = form.abstract(params, mesh)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    for x, spec in zip(jax.tree.leaves(got), jax.tree.leaves(divided), strict=True):
        assert x.sharding.spec == spec
    assert jax.tree.structure(divided) == jax.tree.structure(frozen_specs(shapes, specs))


def test_plain_kernels_have_the_dtype_of_the_run_and_vectors_float32(folder, params):
    form = FrozenForm(dtype="bfloat16")
    got = read_backbone(folder, params, form, make_mesh(MeshSpec(), jax.devices()[:1]))
    assert got["blocks"]["ffn"]["up"]["kernel"].dtype == jnp.bfloat16
    assert got["blocks"]["ffn"]["up"]["bias"].dtype == jnp.float32
    assert got["blocks"]["modulation"].dtype == jnp.float32


def test_a_dit_of_other_shapes_is_refused(folder, params):
    other = jax.tree.map(lambda x: x, params)
    other["head"]["linear"]["bias"] = other["head"]["linear"]["bias"][:-1]
    mesh = make_mesh(MeshSpec(), jax.devices()[:1])
    with pytest.raises(UserError, match=r"head/linear/bias is \(16,\) there and \(15,\)"):
        read_backbone(folder, other, FrozenForm(), mesh)


def test_a_packed_checkpoint_is_refused(folder, tmp_path):
    quantize_checkpoint(folder, tmp_path / "packed", named("fp8"))
    with pytest.raises(UserError, match=r"its DiT is packed; give the checkpoint that it was"):
        model_of(tmp_path / "packed")
