"""UniPC against the reference's trajectories and the linear response of its coefficients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.diffusion import solvers


def run(solver, x, velocity):
    """Every sample along the way, by one scan."""

    def body(state, row):
        state = solvers.step(state, velocity(state.x, row), row)
        return state, state.x

    return jax.jit(lambda x: jax.lax.scan(body, solvers.start(x), solver)[1])(x)


@pytest.mark.parametrize("steps", [2, 3, 4, 8])
def test_trajectory_equals_the_reference(goldens, steps):
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
    """The sample as a combination of the noise and of unit estimates, one axis each."""
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


@pytest.mark.parametrize("make", [solvers.unipc, solvers.euler])
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50, 128])
def test_any_number_of_steps_finds_a_constant(make, steps):
    """If the estimate never changes, every solver lands on it exactly."""
    goal = jnp.linspace(-1, 1, 8)
    solver = make(steps)
    state = solvers.start(jax.random.normal(jax.random.key(0), (8,)))
    for k in range(steps):
        row = jax.tree.map(lambda leaf, k=k: leaf[k], solver)
        state = solvers.step(state, (state.x - goal) / row.sigma, row)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(solver))
    np.testing.assert_allclose(state.x, goal, atol=1e-5)


def test_reference_timesteps_of_50_steps():
    np.testing.assert_array_equal(solvers.unipc(50).timestep[:5], [999, 995, 991, 987, 982])


def test_second_order_beats_euler():
    """On the exact flow of Gaussian data; not the last step, which is of first order by design."""
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


def test_zero_steps_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        solvers.unipc(0)
