"""Weights loaded from a training checkpoint, and quantised from it."""

import jax
import numpy as np
import pytest

from longlive_jax.interop.quantize_checkpoint import quantize_checkpoint
from longlive_jax.io.checkpoint import read_manifest, save_component
from longlive_jax.models.wan import DiTConfig
from longlive_jax.quant.policy import named
from longlive_jax.spec import UserError
from longlive_jax.training.checkpointing import TrainCheckpoints
from longlive_jax.training.trained_weights import TrainedWeights
from tests.random_dit import random_dit

DIT = DiTConfig(
    dim=16, ffn_dim=16, freq_dim=8, text_dim=8, text_len=4, heads=1, layers=1,
    in_channels=4, out_channels=4,
)  # fmt: skip


def test_loads_parameters_or_their_ema(tmp_path):
    _, params = random_dit(DIT)
    ema = jax.tree.map(lambda x: x + 1, params)
    save_component(tmp_path / "ck", "dit", params, DIT)
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match="has no checkpoint of a run"):
        TrainedWeights.load(workdir, "ema", tmp_path / "ck", notify=print)
    workdir.mkdir()
    with TrainCheckpoints(workdir) as checkpoints:
        checkpoints.save(7, {"params": params, "ema": ema})
    for part, tree in (("params", params), ("ema", ema)):
        weights = TrainedWeights.load(workdir, part, tmp_path / "ck", notify=print)
        got = weights.read(("blocks", "ffn", "up", "bias"))
        np.testing.assert_array_equal(got, tree["blocks"]["ffn"]["up"]["bias"])
        quantize_checkpoint(tmp_path / "ck", tmp_path / part, named("fp8"), weights=weights)
    quantize_checkpoint(tmp_path / "ck", tmp_path / "own", named("fp8"))
    from_checkpoint, from_params, from_ema = (
        read_manifest(tmp_path / name)["arrays"]["dit"] for name in ("own", "params", "ema")
    )
    assert from_checkpoint == from_params != from_ema
