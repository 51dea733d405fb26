"""The measurement behind the choice of the keys' smoothing."""

import jax.numpy as jnp
import pytest

from longlive_jax.bench.kv_quant import KVSpec, _errors, _row, synthetic
from longlive_jax.models.wan.packed_cache import KVFormat
from longlive_jax.spec import UserError

SPEC = KVSpec(checkpoint="", tokens=32, heads=2, width=64)


def test_the_default_smoothing_is_robust_to_outlier_channels():
    sample = synthetic(SPEC, 20.0)
    errors = {
        name: float(jnp.sqrt(keys / square))
        for name in ("none", "token_mean", "channel_mean")
        for keys, _, square in [_errors(sample, KVFormat("nvfp4", smoothing=name))]
    }
    assert errors[KVFormat().smoothing] == min(errors.values())
    assert errors["channel_mean"] < 0.12 < 0.2 < min(errors["none"], errors["token_mean"])


def test_bytes_of_packed_keys_and_values():
    row = _row(KVFormat("nvfp4", smoothing="none"), {"some": [synthetic(SPEC, 0.0)]})["some"]
    # Key and value: half a byte per number, a byte per block, and four bytes per chunk.
    assert row["bytes_per_token_and_head"] == round(2 * 36 + 8 / (32 * 2), 3)
    assert 0 < row["keys_error"] < row["keys_and_values_error"] < 0.2


def test_invalid_settings_are_refused():
    with pytest.raises(UserError, match="chunks must be >= 4 to fill the window, got 3"):
        KVSpec(checkpoint="", chunks=3)
    with pytest.raises(UserError, match="width must be a multiple of 16"):
        KVSpec(checkpoint="", width=40)
