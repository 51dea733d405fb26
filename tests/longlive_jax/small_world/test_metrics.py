"""Rates with confidence intervals, aggregated from verdicts."""

import json

import numpy as np
import pytest

from longlive_jax import small_world as sw
from longlive_jax.small_world import metrics
from longlive_jax.small_world.judge import judge_video


def test_a_summary_is_plain_json():
    spec = sw.sample_spec(np.random.default_rng(3), chunks=8, shot_chunks=(3, 4))
    verdict = judge_video(sw.render(spec), spec.captions, sw.frame_bounds(spec))
    result = metrics.summary([verdict])
    assert json.loads(json.dumps(result)) == result
    assert set(result["shape"]) == {"rate", "n", "low", "high"}


def test_a_summary_needs_verdicts():
    with pytest.raises(ValueError, match="no verdicts"):
        metrics.summary([])


def test_wilson_interval():
    np.testing.assert_allclose(metrics.wilson(90, 100), (0.8256, 0.9448), atol=1e-4)
    assert metrics.wilson(0, 0) == (0.0, 1.0)
    assert metrics.wilson(10, 10)[1] == 1.0 and metrics.wilson(0, 10)[0] == 0.0
