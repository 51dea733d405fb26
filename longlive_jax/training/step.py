"""The one update that every task shares."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from longlive_jax.training.state import Params, TrainState

LossFn = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class EMASpec:
    """Average of the parameters: a copy until `start`, then `decay` of the old a step."""

    decay: float = 0.99
    start: int = 100


def make_train_step(loss_fn: LossFn, tx: optax.GradientTransformation, ema: EMASpec, seed: int = 0):
    """`loss_fn(params, batch, key) -> (loss, metrics)` becomes one donated, jitted update.

    The key depends on `seed` and the step alone, so a resumed run draws what the uninterrupted one
    would. An update with a non-finite loss or gradient changes nothing but the step and
    `bad_steps`.
    """

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), grads = grad_fn(state.params, batch, key)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = jnp.where(state.step < ema.start, 0.0, ema.decay)
        average = optax.incremental_update(params, state.ema, 1 - keep)
        old = (state.params, state.ema, state.opt_state)
        params, average, opt_state = _choose(good, (params, average, opt_state), old)
        bad_steps = jnp.where(good, 0, state.bad_steps + 1)
        metrics = metrics | {"loss": loss, "grad_norm": norm, "bad_steps": bad_steps}
        return TrainState(state.step + 1, params, average, opt_state, bad_steps), metrics

    return train_step


def _choose(good: jax.Array, new: Params, old: Params) -> Params:
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
