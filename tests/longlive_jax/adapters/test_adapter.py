"""What an adapter refuses to be, and which models it fits."""

import dataclasses

import numpy as np
import pytest

from longlive_jax.adapters import Adapter
from longlive_jax.adapters.branches import kernel_shapes
from longlive_jax.models.wan import DiTConfig
from longlive_jax.spec import UserError
from tests.longlive_jax.adapters.conftest import random_adapter
from tests.random_dit import random_dit

DIT = DiTConfig(
    dim=32, ffn_dim=48, freq_dim=8, text_dim=8, text_len=4, heads=2, layers=2,
    in_channels=4, out_channels=4,
)  # fmt: skip


def branches(a=(2, 6, 3), b=(2, 3, 5)):
    return {"blocks": {"up": {"a": np.zeros(a), "b": np.zeros(b)}}}


def test_alpha_targets_and_description():
    adapter = Adapter(branches(), 0.5, {"steps": 4}, name="few", role="generator")
    assert (adapter.rank, adapter.alpha, adapter.layers) == (3, 1.5, 2)
    assert adapter.targets == ("blocks.up",)
    assert adapter.describe() == (
        "few (generator): rank 3, alpha 1.5, 1 linears, 2 layers, 0.0 MB, made for steps 4"
    )


def test_levels_say_the_number_of_steps():
    adapter = Adapter(branches(), settings={"levels": [1, 0.5], "shift": None})
    assert adapter.settings == {"levels": (1.0, 0.5), "steps": 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"branches": {}}, "adapts nothing"),
        ({"branches": branches(a=(6, 3))}, r"blocks.up.a must be a factor"),
        ({"branches": branches(b=(2, 4, 5))}, "the factors of blocks.up do not fit"),
        ({"branches": branches(b=(1, 3, 5))}, "the factors of blocks.up do not fit"),
        ({"branches": {"up": {"a": np.zeros((2, 6, 3))}}}, "None"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"role": "teacher"}, "role must be"),
        ({"settings": {"step": 4}}, "did you mean 'steps'"),
        ({"settings": {"steps": 0}}, "steps must be a whole number"),
        ({"settings": {"steps": 2.0}}, "steps must be a whole number"),
        ({"settings": {"solver": "heun"}}, "solver must be"),
        ({"settings": {"steps": 2, "levels": (0.5,)}}, "levels must be 2 numbers"),
        ({"settings": {"levels": (0.5, 0.6)}}, "levels must descend"),
        ({"settings": {"levels": (1.5, 0.6)}}, r"levels must be in \(0, 1\]"),
        ({"settings": {"levels": 3}}, "settings"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        Adapter(**{"branches": branches()} | fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 48}, "it has 32 inputs of cross_attn.k|it has 32 .*puts of blocks"),
        ({"ffn_dim": 64}, "it has 48 .*puts of blocks.ffn"),
        ({"layers": 1}, "it has 2 layers, this one has 1"),
        ({"layers": 3}, "it has 2 layers, this one has 3"),
    ],
)
def test_an_adapter_of_another_model_is_refused(change, message):
    adapter = random_adapter(random_dit(DIT)[1])
    adapter.check_fits(kernel_shapes(random_dit(DIT)[1]))
    other = kernel_shapes(random_dit(dataclasses.replace(DIT, **change))[1])
    with pytest.raises(UserError, match=f"is for another model: .*{message}"):
        adapter.check_fits(other)


def test_an_adapter_of_some_layers_fits_deeper_models_only():
    adapter = dataclasses.replace(random_adapter(random_dit(DIT)[1]), is_partial=True)
    deeper, less = (
        kernel_shapes(random_dit(dataclasses.replace(DIT, layers=n))[1]) for n in (3, 1)
    )
    adapter.check_fits(deeper)
    with pytest.raises(UserError, match="2 layers"):
        adapter.check_fits(less)


def test_a_linear_that_the_model_lacks_is_named():
    adapter = random_adapter(random_dit(DIT)[1])
    blocks = {**adapter.branches["blocks"], "k_img": branches()["blocks"]["up"]}
    rank_4 = {"a": np.zeros((2, 6, 4)), "b": np.zeros((2, 4, 5))}
    adapter = dataclasses.replace(adapter, branches={"blocks": {**blocks, "k_img": rank_4}})
    with pytest.raises(UserError, match=r"it adapts blocks\.k_img, which this one has not"):
        adapter.check_fits(kernel_shapes(random_dit(DIT)[1]))
