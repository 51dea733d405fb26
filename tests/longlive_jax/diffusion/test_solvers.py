"""Solvers: UniPC against the reference's trajectories and against its linear response, and the
stochastic solver against the invariants of the forward process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.diffusion import solvers


def run(solver, x, velocity):
    """The sample after each step, from one scan."""

    def body(state, row):
        state = solvers.step(state, velocity(state.x, row), row)
        return state, state.x

    return jax.jit(lambda x: jax.lax.scan(body, solvers.start(x), solver)[1])(x)


@pytest.mark.parametrize("steps", [2, 3, 4, 8])
def test_the_trajectory_equals_the_reference(goldens, steps):
    with np.load(goldens / "flow_schedulers.npz") as file:
        golden = {k.split("_", 1)[1]: file[k] for k in file.files if k.startswith(f"unipc{steps}_")}
    solver = solvers.unipc(steps)
    np.testing.assert_allclose(solver.sigma, golden["sigmas"][:-1], rtol=1e-7)
    np.testing.assert_array_equal(solver.timestep, golden["timesteps"])
    weights = jnp.asarray(golden["A"])

    def field(x, row):
        return jnp.tanh(x @ weights) + x * row.timestep / 1000

    got = run(solver, jnp.asarray(golden["x0"]), field)
    np.testing.assert_allclose(got, golden["traj"], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("steps", "want"),
    [
        (2, [(0.833222, [0.166778, 0.0])]),
        (3, [(0.909025, [0.090975, 0, 0]), (0.714122, [0.011855, 0.274023, 0])]),
        (
            4,
            [
                (0.937453, [0.062547, 0, 0, 0]),
                (0.833222, [0.017307, 0.149471, 0, 0]),
                (0.624812, [0.020436, -0.067583, 0.422335, 0]),
            ],
        ),
    ],
)
def test_linear_response(steps, want):
    """The weights of the noise and of each step's estimate in the sample, one axis each."""
    solver = solvers.unipc(steps)
    state = solvers.start(jnp.eye(steps + 1)[0])
    for k in range(steps):
        row = jax.tree.map(lambda leaf, k=k: leaf[k], solver)
        estimate = jnp.eye(steps + 1)[k + 1]
        state = solvers.step(state, (state.x - estimate) / row.sigma, row)
        if k < steps - 1:
            noise, estimates = want[k]
            np.testing.assert_allclose(state.x, [noise, *estimates], atol=2e-6)
    np.testing.assert_allclose(state.x, jnp.eye(steps + 1)[steps], atol=2e-6)


@pytest.mark.parametrize("make", [solvers.unipc, solvers.euler, solvers.sde])
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50, 128])
def test_a_constant_estimate_is_reached_exactly(make, steps):
    """By every solver, for any number of steps."""
    goal = jnp.linspace(-1, 1, 8)
    solver = make(steps)
    state = solvers.start(jax.random.normal(jax.random.key(0), (8,)))
    for k in range(steps):
        row = jax.tree.map(lambda leaf, k=k: leaf[k], solver)
        fresh = None if row.noise_std is None else jnp.ones(8)
        state = solvers.step(state, (state.x - goal) / row.sigma, row, fresh)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(solver))
    np.testing.assert_allclose(state.x, goal, atol=1e-5)


def test_timesteps_of_50_steps_equal_the_reference():
    np.testing.assert_array_equal(solvers.unipc(50).timestep[:5], [999, 995, 991, 987, 982])


def test_second_order_beats_euler():
    """On the exact flow of Gaussian data, without the last step, which is first-order by design."""
    variance = 0.3**2

    def scale(sigma):
        return np.sqrt((1 - sigma) ** 2 * variance + sigma**2)

    def velocity(x, row):
        slope = (row.sigma - (1 - row.sigma) * variance) / (
            (1 - row.sigma) ** 2 * variance + row.sigma**2
        )
        return x * slope

    sigma = solvers.levels(10)
    truth = scale(sigma[-2]) / scale(sigma[0])
    unipc, euler = (
        float(jnp.abs(run(make(10), jnp.ones(4), velocity)[-2] - truth).max())
        for make in (solvers.unipc, solvers.euler)
    )
    assert unipc < 0.5 * euler


@pytest.mark.parametrize("steps", [1, 2, 3, 32])
def test_fresh_noise_keeps_every_level(steps):
    """For a known clean sample, the solver's samples follow the forward process."""
    goal, solver = 0.7, solvers.sde(steps)
    after = np.append(solver.sigma[1:], 0)
    gain = solver.predict[:, 1:].sum(1)
    np.testing.assert_allclose(
        solver.predict[:, 0] * (1 - solver.sigma) * goal + gain * goal,
        (1 - after) * goal,
        atol=1e-6,
    )
    variance = (solver.predict[:, 0] * solver.sigma) ** 2 + solver.noise_std**2
    np.testing.assert_allclose(variance, after**2, atol=1e-6)
    assert (solver.noise_std[:-1] > 0).all() and solver.noise_std[-1] == 0


def test_the_stochastic_solver_converges_to_the_data_std_in_second_order():
    """Computed from the coefficients, without the last step, which is first-order by design.

    The optimal estimate for Gaussian data is linear, so the covariance of the sample and the last
    estimate can be propagated instead of samples.
    """

    def std_error(steps):
        solver = solvers.sde(steps)
        sigma = np.asarray(solver.sigma, np.float64)
        level = (1 - sigma) ** 2 + sigma**2  # variance of a sample, for data of variance 1
        cov = np.diag([level[0], 0.0])
        for k in range(steps - 1):
            clean, row = (1 - sigma[k]) / level[k], solver.predict[k]
            move = np.array([[row[0] + row[1] * clean, row[2]], [clean, 0.0]])
            cov = move @ cov @ move.T + np.diag([solver.noise_std[k] ** 2, 0.0])
        return abs(np.sqrt(cov[0, 0] / level[-1]) - 1)

    assert std_error(100) < 0.03
    assert std_error(400) < 0.35 * std_error(200) < 0.35**2 * std_error(100)


def test_fresh_noise_is_scaled_by_its_std():
    solver, x = solvers.sde(4), jnp.linspace(-1, 1, 8)
    row = jax.tree.map(lambda leaf: leaf[1], solver)
    velocity = jnp.tanh(x)
    without, with_noise = (
        solvers.step(solvers.start(x), velocity, row, jnp.full(8, fresh)).x for fresh in (0.0, 1.0)
    )
    np.testing.assert_allclose(with_noise - without, row.noise_std, rtol=1e-5)


def test_zero_steps_is_an_error():
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        solvers.unipc(0)


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_exact_levels_in_place_of_a_shift(name):
    """Those of a shift give its table; a first level of 1 is the limit of levels below it."""
    make = solvers.SOLVERS[name]
    for same, want in zip(
        jax.tree.leaves(make(4, levels=solvers.levels(4)[:-1])),
        jax.tree.leaves(make(4)),
        strict=True,
    ):
        np.testing.assert_array_equal(same, want)
    exact = make(4, levels=(1.0, 0.9375, 0.75, 0.57))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(exact))
    np.testing.assert_array_equal(exact.timestep, [1000, 937, 750, 570])
    single = make(4, levels=tuple(map(float, np.float32([1.0, 0.9375, 0.75, 0.57]))))
    np.testing.assert_array_equal(single.timestep, exact.timestep)
    near = make(4, levels=(1 - 1e-300**0.05, 0.9375, 0.75, 0.57))
    for got, want in zip(jax.tree.leaves(exact), jax.tree.leaves(near), strict=True):
        np.testing.assert_allclose(got, want, atol=0.02)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((0.9, 0.5), "levels must be 3 numbers, one per step, got 2"),
        ((0.9, 0.5, 0.5), "levels must descend"),
        ((0.9, 0.5, 0.0), r"levels must be in \(0, 1\]"),
        ((1.1, 0.5, 0.2), r"levels must be in \(0, 1\]"),
        ((float("nan"), 0.5, 0.2), r"levels must be in \(0, 1\]"),
    ],
)
def test_levels_that_cannot_be_are_named(levels, message):
    with pytest.raises(ValueError, match=message):
        solvers.unipc(3, levels=levels)
