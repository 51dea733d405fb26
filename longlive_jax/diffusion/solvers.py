"""Multistep solvers for the flow ODE and its reverse SDE, as tables of coefficients.

At each step the model turns the current sample into an estimate m_0 of the clean sample. The update
is then linear in a few arrays:

    corrected = C . (sample, last corrected, m_0, m_-1, m_-2)
    next      = P . (corrected, m_0, m_-1) + noise_std * fresh noise

The coefficients depend only on the noise levels. They are computed on the host in float64 and
passed to the device as one small float32 table, so `step` is a pure function that `lax.scan` runs.

UniPC: Zhao et al. 2023, arXiv:2302.04867. Here it is of order 2 with B2(h) = expm1(-h), data
prediction, the corrector, and a first-order last step, which returns the last estimate exactly.

SDE-DPM-Solver++(2M): Lu et al. 2022, arXiv:2211.01095, section 5. It replaces part of the noise at
each step, so early errors decay instead of persisting. This helps with many steps and a model that
is inaccurate at high noise; UniPC is meant for few steps.
"""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct

from longlive_jax.diffusion.flow import TIMESTEPS, shifted, x0_from_velocity
from longlive_jax.typing import Array, Float

ROUNDING = 1e-4
"""Added to the timestep of a given level before it is truncated: 0.57 in float32 is 569.99999."""


@struct.dataclass
class Solver:
    """A table of coefficients with one row per step; a pytree that `lax.scan` slices.

    Attributes:
      sigma: noise level of the sample that the model gets.
      timestep: timestep that the model gets, an integer value.
      correct: coefficients C of the corrector (see the module docstring).
      predict: coefficients P of the predictor.
      noise_std: standard deviation of the fresh noise; None for a deterministic solver.
    """

    sigma: Float[Array | np.ndarray, "steps"]
    timestep: Float[Array | np.ndarray, "steps"]
    correct: Float[Array | np.ndarray, "steps 5"]
    predict: Float[Array | np.ndarray, "steps 3"]
    noise_std: Float[Array | np.ndarray, "steps"] | None = None

    @property
    def steps(self) -> int:
        """Number of steps, which is the number of model calls per chunk."""
        return self.sigma.shape[0]


@struct.dataclass
class SolverState:
    """The state that a solver carries from step to step, in float32.

    Attributes:
      x: current sample.
      corrected: last corrected sample.
      m1: estimate of the clean sample one step ago.
      m2: estimate of the clean sample two steps ago.
    """

    x: Float[Array, "*shape"]
    corrected: Float[Array, "*shape"]
    m1: Float[Array, "*shape"]
    m2: Float[Array, "*shape"]


def start(noise: Float[Array, "*shape"]) -> SolverState:
    """The state before the first step, in float32."""
    x = noise.astype(jnp.float32)
    empty = jnp.zeros_like(x)
    return SolverState(x=x, corrected=x, m1=empty, m2=empty)


def step(
    state: SolverState,
    velocity: Float[Array, "*shape"],
    row: Solver,
    fresh: Float[Array, "*shape"] | None = None,
) -> SolverState:
    """Advances the state by one step.

    Args:
      state: state before the step.
      velocity: the model's prediction at `state.x`.
      row: one row of the solver's table.
      fresh: standard normal noise; required if and only if the solver has a `noise_std`.
    """
    m0 = x0_from_velocity(state.x, velocity, jnp.asarray(row.sigma))
    c, p = row.correct, row.predict
    corrected = (
        c[0] * state.x + c[1] * state.corrected + c[2] * m0 + c[3] * state.m1 + c[4] * state.m2
    )
    x = p[0] * corrected + p[1] * m0 + p[2] * state.m1
    if row.noise_std is not None:
        assert fresh is not None  # required, see the docstring
        x = x + row.noise_std * fresh
    return SolverState(x=x, corrected=corrected, m1=m0, m2=state.m1)


def levels(steps: int, *, shift: float = 5.0) -> np.ndarray:
    """Noise levels for `steps` model calls, float64 [steps + 1], ending at 0.

    Raises ValueError if `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    # The reference starts at the float32 value of 0.999 and truncates the resulting timesteps.
    even = np.linspace(float(np.float32(0.999)), 0.0, steps + 1)[:-1]
    return np.append(shifted(even, shift), 0.0)


def check_levels(given: Sequence[float], steps: int) -> None:
    """Raises ValueError unless `given` are `steps` descending noise levels in (0, 1]."""
    if len(given) != steps:
        raise ValueError(f"levels must be {steps} numbers, one per step, got {len(given)}")
    if not all(0 < level <= 1 for level in given):
        raise ValueError(f"levels must be in (0, 1], got {tuple(given)}")
    if any(after >= before for before, after in itertools.pairwise(given)):
        raise ValueError(f"levels must descend, got {tuple(given)}")


def _sigma(steps: int, shift: float, given: Sequence[float] | None) -> np.ndarray:
    """The noise levels `given`, or else those of steps and shift; float64, ending at 0."""
    if given is None:
        return levels(steps, shift=shift)
    check_levels(given, steps)
    return np.append(np.asarray(given, np.float64), 0.0)


def unipc(steps: int, *, shift: float = 5.0, levels: Sequence[float] | None = None) -> Solver:
    """UniPC of order 2 for any number of steps; with one or two steps it equals Euler."""
    sigma = _sigma(steps, shift, levels)
    correct, predict = np.zeros((steps, 5)), np.zeros((steps, 3))
    correct[0, 0] = 1.0
    for k in range(steps):
        second = 0 < k < steps - 1
        predict[k] = _predictor(sigma, k, second=second)
        if k > 0:
            correct[k] = _corrector(sigma, k, second=k > 1)
    return _table(sigma, levels, correct, predict)


def euler(steps: int, *, shift: float = 5.0, levels: Sequence[float] | None = None) -> Solver:
    """Euler: first-order steps along the velocity, on the same noise levels."""
    sigma = _sigma(steps, shift, levels)
    correct = np.zeros((steps, 5))
    correct[:, 0] = 1.0
    predict = np.stack([_predictor(sigma, k, second=False) for k in range(steps)])
    return _table(sigma, levels, correct, predict)


def sde(steps: int, *, shift: float = 5.0, levels: Sequence[float] | None = None) -> Solver:
    """SDE-DPM-Solver++(2M) on the same noise levels; the last step adds no noise."""
    sigma = _sigma(steps, shift, levels)
    correct, predict = np.zeros((steps, 5)), np.zeros((steps, 3))
    correct[:, 0] = 1.0
    for k in range(steps):
        predict[k] = _predictor(sigma, k, second=0 < k < steps - 1, fresh=True)
    remaining = predict[:, 0] * sigma[:-1]  # standard deviation of the old noise after the step
    return _table(sigma, levels, correct, predict, np.sqrt(sigma[1:] ** 2 - remaining**2))


SOLVERS = {"unipc": unipc, "euler": euler, "sde": sde}
"""Maps a solver's name to its constructor, which takes a number of steps and a shift, or the exact
noise levels of the steps in place of the shift: `steps` descending numbers in (0, 1]."""


def _table(sigma: np.ndarray, given: Sequence[float] | None, *columns: np.ndarray) -> Solver:
    """The table of a solver; `given` are the exact levels, if they do not follow from a shift."""
    timestep = np.trunc(TIMESTEPS * sigma[:-1] + (0.0 if given is None else ROUNDING))
    return Solver(*(leaf.astype(np.float32) for leaf in (sigma[:-1], timestep, *columns)))


def _log_snr(sigma: float) -> float:
    """log(alpha / sigma), half the log signal-to-noise ratio; infinite for sigma = 0 and 1."""
    if sigma in (0, 1):
        return np.inf if sigma == 0 else -np.inf
    return float(np.log1p(-sigma) - np.log(sigma))


def _predictor(sigma: np.ndarray, k: int, *, second: bool, fresh: bool = False) -> np.ndarray:
    """Weights of (corrected, m_0, m_-1) in the sample at level k + 1.

    With `fresh`, those of the reverse SDE, in which old noise decays twice as fast as in the flow.
    `second` adds the second-order term.
    """
    now, after = sigma[k], sigma[k + 1]
    h = _log_snr(after) - _log_snr(now)
    gain = -(1 - after) * np.expm1(-2 * h if fresh else -h)
    row = np.array([after / now * (np.exp(-h) if fresh else 1.0), gain, 0.0])
    if second:
        ratio = (_log_snr(sigma[k - 1]) - _log_snr(now)) / h
        row += gain * 0.5 / ratio * np.array([0.0, -1.0, 1.0])
    return row


def _corrector(sigma: np.ndarray, k: int, *, second: bool) -> np.ndarray:
    """Weights of (sample, corrected at k - 1, m_0, m_-1, m_-2) in the corrected sample at level k.

    m_0 is the estimate at level k itself: the step from k - 1 is repeated with its end known.
    """
    before, now = sigma[k - 1], sigma[k]
    h = _log_snr(now) - _log_snr(before)
    b = np.expm1(-h)
    gain = -(1 - now) * b
    rho_past, rho_now, ratio = 0.0, 0.5, 1.0
    if second:
        ratio = (_log_snr(sigma[k - 2]) - _log_snr(before)) / h
        phi2 = b / -h - 1.0
        phi3 = phi2 / -h - 0.5
        rho_now = phi2 / b  # the limit for a first level of 1, where the ratio is infinite
        if np.isfinite(ratio):
            rho_past, rho_now = np.linalg.solve(
                np.array([[1.0, 1.0], [ratio, 1.0]]), np.array([phi2 / b, 2.0 * phi3 / b])
            )
    past = rho_past / ratio
    return np.array([0.0, now / before, gain * rho_now, gain * (1.0 - rho_now - past), gain * past])
