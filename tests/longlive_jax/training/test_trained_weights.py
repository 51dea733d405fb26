"""Weights out of a run's save, and packed from there."""

import jax
import numpy as np
import pytest

from longlive_jax.interop.quantize_checkpoint import quantize_checkpoint
from longlive_jax.io.checkpoint import read_manifest, save_component
from longlive_jax.models.wan import DiTConfig
from longlive_jax.quant.policy import named
from longlive_jax.spec import UserError
from longlive_jax.training.checkpointing import TrainCheckpoints
from longlive_jax.training.trained_weights import SavedWeights
from tests.random_dit import random_dit

DIT = DiTConfig(
    dim=16, ffn_dim=16, freq_dim=8, text_dim=8, text_len=4, heads=1, layers=1,
    in_channels=4, out_channels=4,
)  # fmt: skip


def test_parameters_or_their_average(tmp_path):
    _, params = random_dit(DIT)
    average = jax.tree.map(lambda x: x + 1, params)
    save_component(tmp_path / "ck", "dit", params, DIT)
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match="holds no save of a run"):
        SavedWeights.of(workdir, "ema", tmp_path / "ck", say=print)
    workdir.mkdir()
    with TrainCheckpoints(workdir) as saves:
        saves.save(7, {"params": params, "ema": average})
    for part, tree in (("params", params), ("ema", average)):
        weights = SavedWeights.of(workdir, part, tmp_path / "ck", say=print)
        got = weights.read(("blocks", "ffn", "up", "bias"))
        np.testing.assert_array_equal(got, tree["blocks"]["ffn"]["up"]["bias"])
        quantize_checkpoint(tmp_path / "ck", tmp_path / part, named("fp8"), weights=weights)
    quantize_checkpoint(tmp_path / "ck", tmp_path / "own", named("fp8"))
    own, one, other = (
        read_manifest(tmp_path / name)["arrays"]["dit"] for name in ("own", "params", "ema")
    )
    assert own == one != other
