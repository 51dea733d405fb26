"""Means of a window of metrics, and the plot of their curves."""

import math

import jax.numpy as jnp
import numpy as np

from longlive_jax.training.metrics import mean_metrics, plot_curves


def device_metrics(**values):
    return {name: jnp.float32(value) for name, value in values.items()}


def test_means_are_over_finite_values():
    window = [device_metrics(loss=x, level=math.nan) for x in (0.1, math.inf, 0.7, 0.4)]
    means = mean_metrics(window)
    assert means["loss"] == np.array([np.float32(x) for x in (0.1, 0.7, 0.4)], float).mean()
    assert math.isnan(means["level"])


def test_a_metric_missing_from_some_steps_is_the_mean_of_the_others():
    """Wherever those steps are in the window."""
    critic, both = device_metrics(critic=1.0), device_metrics(generator=4.0, critic=3.0)
    for window in ([both, critic], [critic, both]):
        assert mean_metrics(window) == {"critic": 2.0, "generator": 4.0}
    assert mean_metrics([both, critic, both]) == {"critic": 7 / 3, "generator": 4.0}


def test_a_window_without_metrics_has_no_means():
    assert mean_metrics([]) == mean_metrics([{}]) == {}


def test_counters_of_skipped_updates_are_not_plotted(tmp_path):
    names = ("bad_steps", "critic_bad_steps")
    plot_curves({"": [{"step": 1} | dict.fromkeys(names, 0.0)]}, tmp_path / "counters.png")
    assert not (tmp_path / "counters.png").exists()


def test_a_metric_of_every_fifth_step_is_plotted(tmp_path):
    records = [{"step": i, "critic_loss": 1 / (i + 1)} for i in range(20)]
    for record in records[::5]:
        record["generator_grad_norm"] = 2.0
    plot_curves({"": records}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
