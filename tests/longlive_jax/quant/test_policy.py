"""Policies select the intended linears, and refuse models that do not match."""

import pytest
from flax import nnx

from longlive_jax.models.params import abstract
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.quant.policy import (
    LINEARS,
    POLICIES,
    Format,
    QuantPolicy,
    QuantSpec,
    Recipe,
    kernels,
    named,
)


def shapes(**widths):
    return abstract(lambda: DiT(DiTConfig(**widths), rngs=nnx.Rngs(0)))[1]


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"none"}))
def test_every_policy_selects_the_300_linears_of_the_5b(name):
    params = shapes()
    formats = named(name).formats(params)
    parts = {f"{part}/{x}" for part in ("self_attn", "cross_attn") for x in "qkvo"}
    assert set(formats) == {f"blocks/{p}/kernel" for p in parts | {"ffn/up", "ffn/down"}}
    assert sum(kernels(params)[path][0] for path in formats) == 300
    left = set(kernels(params)) - set(formats)
    assert left == {
        f"{p}/kernel"
        for p in (
            "patch_embedding", "text_embedding/fc1", "text_embedding/fc2", "time_embedding/fc1",
            "time_embedding/fc2", "time_projection", "head/linear",
        )
    }  # fmt: skip
    assert "300 of 307 matrices (98.2 % of all parameters)" in named(name).describe(params)


def test_training_rules_are_those_of_the_reference():
    form = named("nvfp4_train").rules[0][1]
    assert (form.weights, form.tile, form.activations) == ("static_6", 16, "mse")
    assert form.recipe == Recipe(gradients="mse", stochastic="unbiased", hadamard=True, twice=False)
    form = named("nvfp4_frozen").rules[0][1]
    assert (form.weights, form.tile, form.activations) == ("mse", 16, "mse")
    assert form.recipe == Recipe(gradients="mse", stochastic="unbiased", frozen=True)
    assert str(form).endswith("gradients mse, stochastic rounding (unbiased), frozen")
    assert named("nvfp4_train").trains and not named("nvfp4").trains and not named("fp8").trains


def test_the_first_matching_rule_wins():
    first = Format(weights="static_4")
    policy = QuantPolicy("mine", ((r"blocks/ffn/.*/kernel", first), (LINEARS, Format())))
    formats = policy.formats(shapes(dim=48, ffn_dim=64, heads=2, layers=2))
    assert formats["blocks/ffn/up/kernel"] == first
    assert formats["blocks/self_attn/q/kernel"] == Format()
    assert policy.describe(shapes()).count("matrices") == 2


def test_errors_name_the_pattern_matrix_or_policy():
    with pytest.raises(ValueError, match=r"no matrix matches 'blocks/attn/kernel'"):
        QuantPolicy("mine", (("blocks/attn/kernel", Format()),)).formats(shapes())
    odd = shapes(dim=48, ffn_dim=72, heads=2, layers=2)
    with pytest.raises(ValueError, match=r"blocks/ffn/down/kernel has 72 inputs.*blocks of 16"):
        named("nvfp4").formats(odd)
    with pytest.raises(ValueError, match=r"unknown 'nvfp4_trian'; did you mean 'nvfp4_train'"):
        QuantSpec("nvfp4_trian")
    with pytest.raises(ValueError, match="tiles of 16 x 16"):
        Format(recipe=Recipe())
