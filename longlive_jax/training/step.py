"""The one update that every task shares."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from longlive_jax.training.state import Params, TrainState

Metrics = dict[str, jax.Array]
Prepare = Callable[[Params], Callable[[Params, jax.Array], Params]]
"""`prepare(params)` makes what an update needs of its parameters once, such as packed copies, and
gives `dress(params, key)`, which puts the same parameters before the loss in another form."""
LossFn = Callable[..., tuple[jax.Array, tuple[Metrics, Any]]]
"""`(params, batch, key, memory) -> (loss, (metrics, memory))`."""


Weigh = Callable[[Any], jax.Array]
"""What a part of a batch counts for, such as the frames that its loss is the mean of."""


def no_preparation(_params: Params) -> Callable[[Params, jax.Array], Params]:
    """Nothing to prepare: the loss sees the float32 parameters themselves."""
    return lambda params, _key: params


def uniform_weight(_batch: Any) -> jax.Array:
    """Every part counts for the same."""
    return jnp.ones(())


def stateless(loss: Callable[..., tuple[jax.Array, Metrics]]) -> LossFn:
    """A loss of (params, batch, key) alone, as one that remembers nothing."""

    def loss_fn(params: Params, batch: Any, key: jax.Array, memory: Any):
        value, metrics = loss(params, batch, key)
        return value, (metrics, memory)

    return loss_fn


@dataclasses.dataclass(frozen=True)
class EMASpec:
    """Average of the parameters: a copy until `start`, then `decay` of the old a step."""

    decay: float = 0.99
    start: int = 100


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    ema: EMASpec,
    seed: int = 0,
    *,
    accumulate: int = 1,
    shardings: TrainState | None = None,
    prepare: Prepare = no_preparation,
    weigh: Weigh = uniform_weight,
):
    """`loss_fn` becomes one donated, jitted update `(state, batch) -> (state, metrics)`.

    The key depends on `seed` and the step alone, so a resumed run draws what the uninterrupted one
    would. An update with a non-finite loss or gradient changes nothing but the step, `bad_steps`
    and the memory, of which the loss itself takes care: a choice here would keep two of it.
    With `accumulate` the batch is worked off in that many parts, by a scan, and the update is that
    of their mean gradient, each as heavy as `weigh` says. `shardings` say where the new state lies.
    `prepare` is called once, for all parts; gradients are of the parameters themselves.
    """
    placed = {} if shardings is None else {"out_shardings": (shardings, None)}

    @partial(jax.jit, donate_argnums=0, **placed)
    def train_step(state: TrainState, batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grad_fn = jax.value_and_grad(_dressed(loss_fn, prepare(state.params)), has_aux=True)
        whole = grad_fn if accumulate == 1 else _accumulated(grad_fn, accumulate, weigh)
        (loss, (metrics, memory)), grads = whole(state.params, batch, key, state.memory)
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
        return TrainState(state.step + 1, params, average, opt_state, bad_steps, memory), metrics

    return train_step


def _dressed(loss_fn: LossFn, dress: Callable[[Params, jax.Array], Params]) -> LossFn:
    def loss(params: Params, batch: Any, key: jax.Array, memory: Any):
        return loss_fn(dress(params, key), batch, key, memory)

    return loss


def _accumulated(grad_fn, parts: int, weigh: Weigh):
    """`grad_fn` part by part: weighted means of losses, metrics and gradients, in float32; a metric
    is that of the parts where it is finite."""

    def whole(params: Params, batch, key: jax.Array, memory: Any):
        def add(memory: Any, xs):
            part, key, share = xs
            (loss, (metrics, memory)), grads = grad_fn(params, part, key, memory)
            there = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), share, 0.0), metrics)
            metrics = jax.tree.map(lambda x, w: w * jnp.where(w > 0, x, 0.0), metrics, there)
            return memory, (*jax.tree.map(lambda x: share * x, (loss, grads)), metrics, there)

        def step(carry, xs):
            memory, sums = carry
            memory, found = add(memory, xs)
            return (memory, jax.tree.map(jnp.add, sums, found)), None

        split = _parts(batch, parts)
        weights = jax.vmap(weigh)(split)
        shares = weights / jnp.maximum(weights.sum(), 1e-30)
        inputs = (split, jax.random.split(key, parts), shares)
        first = jax.tree.map(lambda x: x[0], inputs)
        _, shapes = jax.eval_shape(add, memory, first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (memory, (loss, grads, metrics, there)), _ = lax.scan(step, (memory, zeros), inputs)
        return (loss, (jax.tree.map(jnp.divide, metrics, there), memory)), grads

    return whole


def _parts(batch: Any, parts: int) -> Any:
    """[parts * b, ...] as [parts, b, ...], every device keeping its own rows."""

    def split(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def _choose(good: jax.Array, new: Params, old: Params) -> Params:
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
