"""The training table against the reference, and the algebra of the flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.diffusion import flow


def test_the_table_equals_the_reference(goldens):
    schedule = flow.FlowSchedule()
    with np.load(goldens / "flow_schedulers.npz") as file:
        np.testing.assert_allclose(schedule.sigmas, file["fm_sigmas"], rtol=3e-7)
        np.testing.assert_allclose(schedule.timesteps, file["fm_timesteps"], rtol=3e-7)
        np.testing.assert_allclose(schedule.weights, file["fm_weights"], atol=2e-5)


def test_values_of_the_table():
    schedule = flow.FlowSchedule()
    np.testing.assert_allclose(schedule.sigmas[:3], [1.0, 0.9998, 0.9996], atol=1e-6)
    assert schedule.timesteps[-1] == pytest.approx(4.980, abs=1e-3)
    assert schedule.weights.mean() == pytest.approx(1.0, abs=1e-5)
    assert schedule.weights[0] == 0


def test_index_is_the_nearest_entry():
    schedule = flow.FlowSchedule()
    timesteps = jnp.asarray(schedule.timesteps[[0, 17, 999]])
    np.testing.assert_array_equal(schedule.index(timesteps + 1e-3), [0, 17, 999])
    assert int(schedule.index(jnp.zeros(()))) == 999


def test_velocity_and_x0_are_inverse():
    keys = jax.random.split(jax.random.key(0), 3)
    x0, noise = (jax.random.normal(k, (2, 3, 4, 5, 6)) for k in keys[:2])
    sigma = jax.random.uniform(keys[2], (2, 3), minval=0.1)
    x = flow.corrupt(x0, noise, sigma)
    velocity = flow.velocity_target(x0, noise)
    np.testing.assert_allclose(flow.x0_from_velocity(x, velocity, sigma), x0, atol=1e-6)
    np.testing.assert_allclose(flow.velocity_from_x0(x, x0, sigma), velocity, atol=2e-5)


def test_level_zero_is_clean():
    x0 = jnp.ones((1, 1, 2, 2, 3))
    np.testing.assert_array_equal(flow.corrupt(x0, 7 * x0, jnp.zeros((1, 1))), x0)


def test_drawn_levels_cover_the_table():
    index = flow.FlowSchedule().draw(jax.random.key(1), (20000,))
    assert index.min() < 5 and index.max() > 994
    assert float(index.mean()) == pytest.approx(499.5, abs=10)
