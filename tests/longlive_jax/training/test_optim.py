"""Optimizers and learning-rate schedules."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from longlive_jax.training.optim import OptimSpec, make_optimizer, matrix_axes, schedule
from longlive_jax.training.update import EMASpec


def test_schedule_warms_up_holds_and_falls():
    rate = schedule(1.0, OptimSpec(warmup=10, decay=0.5), 100)
    got = [float(rate(i)) for i in (0, 9, 10, 49, 75, 100)]
    assert got == pytest.approx([0.1, 0.91, 1.0, 1.0, 0.5, 0.0], abs=1e-6)
    assert float(schedule(1.0, OptimSpec(), 100)(100)) == 1.0
    falling = schedule(1.0, OptimSpec(warmup=10, decay=1.0), 100)
    assert [float(falling(i)) for i in (0, 10, 55, 100)] == pytest.approx([0.1, 1.0, 0.5, 0.0])


def test_muon_takes_matrices_and_leaves_the_rest_to_adam():
    params = {
        "conv": {"kernel": jnp.zeros((3, 3, 3, 4, 8)), "bias": jnp.zeros(8)},
        "head": {"linear": {"kernel": jnp.zeros((4, 8))}},
        "blocks": {"q": {"kernel": jnp.zeros((2, 4, 8))}, "modulation": jnp.zeros((2, 6, 4))},
    }
    axes = matrix_axes(params)
    assert axes["conv"]["bias"] is None and axes["blocks"]["modulation"] is None
    assert axes["head"]["linear"]["kernel"] is None
    assert axes["conv"]["kernel"].reduction_axis == (0, 1, 2, 3)
    assert axes["blocks"]["q"]["kernel"].reduction_axis == (1,)
    tx = make_optimizer(OptimSpec(name="muon", lr=0.1), 10)
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    singular = jnp.linalg.svd(updates["blocks"]["q"]["kernel"][0], compute_uv=False)
    # Orthogonalised, unlike the gradient.
    assert float(singular.min()) > 0.3 * float(singular.max())
    chex.assert_trees_all_equal_shapes(optax.apply_updates(params, updates), params)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"name": "sgd"}, "sgd"),
        ({"decay": 1.5}, r"1\.5"),
        ({"lr": -1.0}, r"optim\.lr must be from 0 to 100, got -1\.0"),
        ({"lr": float("nan")}, r"optim\.lr .* got nan"),
        ({"b2": 1.0}, r"optim\.b2 must be in \[0, 1\), got 1\.0"),
        ({"warmup": -1}, "optim.warmup must be >= 0"),
        ({"clip": 0.0}, "optim.clip > 0"),
    ],
)
def test_bad_optimizer_settings_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        OptimSpec(**bad)


def test_bad_ema_decay_is_named():
    with pytest.raises(ValueError, match=r"ema\.decay must be in \[0, 1\), got 1\.0"):
        EMASpec(decay=1.0)
