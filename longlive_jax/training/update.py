"""The update: a compiled program `(state, frozen, batch) -> (state, metrics)` for each group.

For each group that a step trains, in order: the gradient of the group's loss, a check that both are
finite, the optimizer, the EMA. Everything random derives from the seed and `state.step`, so a
resumed run draws what the uninterrupted one would.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.parallel.rules import Rules, check_divides, shardings
from longlive_jax.training.state import (
    REPLICATED,
    Trained,
    TrainState,
    abstract_state,
    group_specs,
    init_group,
)
from longlive_jax.typing import Array, Float, Params

type Metrics = dict[str, Float[Array, ""]]
"""Scalars by name."""

type QuantizeForLoss = Callable[[Params, Array], Params]
"""`(params, key) -> params` in the form that the loss computes with."""

type Prepare = Callable[[Params], QuantizeForLoss]
"""Computes, once per update, what the loss needs of the parameters, such as packed copies."""

type MicrobatchWeight = Callable[[Any], Array]
"""Weight of a microbatch in the mean, such as the number of frames that its loss averages over."""

_GROUP_STREAM = 2**31
"""Folded into a key, plus a group's index, to derive the group's key.

It is above all step numbers and all numbers that losses fold into the same key. An index alone
would collide with them and with keys from `split`, as `split(key, n)[i]` equals `fold_in(key, i)`.
"""

type Update = Callable[[TrainState, Mapping[str, Params], Any], tuple[TrainState, Metrics]]
"""`(state, frozen, batch) -> (state, metrics)`; the state is donated."""


class LossFn(Protocol):
    """A loss of one group's parameters."""

    def __call__(
        self, params: Params, batch: Any, key: Array, loss_state: Any, frozen: Mapping[str, Params]
    ) -> tuple[Array, tuple[Metrics, Any]]:
        """`(loss, (metrics, loss_state))`.

        `frozen` holds parameters without a gradient, by name: the task's own and those of the other
        groups.
        """


@dataclasses.dataclass(frozen=True)
class EMASpec:
    """EMA of the parameters.

    Attributes:
      decay: weight of the previous average in each update.
      start: training step from which on it averages; until then the EMA equals the parameters.
    """

    decay: float = 0.99
    start: int = 100

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay must be in [0, 1), got {self.decay}")


def no_preparation(_params: Params) -> QuantizeForLoss:
    """The loss computes with the float32 parameters themselves."""
    return lambda params, _key: params


def uniform_weight(_batch: Any) -> Array:
    """The same weight for every microbatch."""
    return jnp.ones(())


def stateless(loss: Callable[..., tuple[Array, Metrics]]) -> LossFn:
    """The `LossFn` of a loss `(params, batch, key) -> (value, metrics)` without loss state."""

    def loss_fn(params, batch, key, loss_state, frozen):
        value, metrics = loss(params, batch, key)
        return value, (metrics, loss_state)

    return loss_fn


@dataclasses.dataclass(frozen=True)
class Group:
    """How a group of parameters is trained.

    Attributes:
      init: key -> float32 parameters; traced, so that they are created sharded.
      loss: loss of the group.
      tx: optimizer.
      ema: EMA of the parameters, or None.
      rules: PartitionSpecs by the path of a parameter.
      restore: reads the initial parameters onto the mesh, into arrays of their own, which are
        donated; None: `init` creates them.
      prepare: computes what the loss needs of the parameters, once per update.
      microbatch_weight: weight of a microbatch under gradient accumulation.
    """

    init: Callable[[Array], Params]
    loss: LossFn
    tx: optax.GradientTransformation
    ema: EMASpec | None = None
    rules: Rules = REPLICATED
    restore: Callable[[], Params] | None = None
    prepare: Prepare = no_preparation
    microbatch_weight: MicrobatchWeight = uniform_weight


@dataclasses.dataclass(frozen=True)
class LossState:
    """What losses keep between steps.

    Attributes:
      init: creates it at step 0.
      specs: PartitionSpecs of its arrays.
    """

    init: Callable[[], Any] = tuple
    specs: Any = ()


class Trainer:
    """Creates the train state of named groups of parameters, and compiles their updates.

    Attributes:
      mesh: devices of the run.
      abstract: shapes, dtypes and shardings of the state.
      specs: PartitionSpecs of the state.
    """

    def __init__(
        self,
        groups: Mapping[str, Group],
        mesh: Mesh,
        *,
        seed: int = 0,
        accumulate: int = 1,
        loss_state: LossState | None = None,
    ):
        """Divides a batch into `accumulate` microbatches; an update applies their mean gradient.

        Raises ValueError for parameters that no rule matches or that do not divide over the mesh.
        """
        self.mesh = mesh
        self._groups, self._seed, self._accumulate = dict(groups), seed, accumulate
        self._loss_state = LossState() if loss_state is None else loss_state
        shapes = jax.eval_shape(self._initial, {})
        self.specs = TrainState(
            step=P(),  # type: ignore[arg-type]
            groups={
                name: group_specs(shapes.groups[name], group.tx, group.rules)
                for name, group in self._groups.items()
            },
            loss_state=self._loss_state.specs,
        )
        for name in self._groups:
            check_divides(mesh, self.specs.groups[name].params, shapes.groups[name].params)
        self._shardings = shardings(mesh, self.specs)
        self.abstract = abstract_state(shapes, self._shardings)
        self._programs: dict[tuple[str, bool], Update] = {}

    def init(self) -> TrainState:
        """The state at step 0, created sharded: no device ever holds an unsharded copy."""
        restored = {
            name: group.restore()
            for name, group in self._groups.items()
            if group.restore is not None
        }
        create = jax.jit(self._initial, out_shardings=self._shardings, donate_argnums=0)
        return create(restored)

    def _initial(self, restored: Mapping[str, Params]) -> TrainState:
        groups = {}
        for index, (name, group) in enumerate(self._groups.items()):
            key = _group_key(jax.random.key(self._seed), index)
            params = restored[name] if name in restored else group.init(key)
            groups[name] = init_group(params, group.tx, ema=group.ema is not None)
        return TrainState(jnp.zeros((), jnp.int32), groups, self._loss_state.init())

    def program(self, names: tuple[str, ...]) -> Update:
        """The update of the groups `names`, in this order: the programs of `programs` in turn."""
        programs = self.programs(names)
        return programs[0] if len(programs) == 1 else partial(_in_turn, programs)

    def programs(self, names: tuple[str, ...]) -> tuple[Any, ...]:
        """The jitted update of each group of `names`; the last one counts the step.

        Each is compiled once. One program for several groups would need more memory: XLA gives
        large buffers of one group memory before the group before it is done.
        """
        return tuple(self._program(name, counts=name == names[-1]) for name in names)

    def _program(self, name: str, *, counts: bool) -> Update:
        if (name, counts) not in self._programs:
            self._programs[name, counts] = jax.jit(
                partial(self._update, name, counts),
                donate_argnums=0,
                out_shardings=(self._shardings, None),
            )
        return self._programs[name, counts]

    def _update(
        self,
        name: str,
        counts: bool,
        state: TrainState,
        frozen: Mapping[str, Params],
        batch: Any,
    ) -> tuple[TrainState, Metrics]:
        """One group's part of a training step."""
        key = jax.random.fold_in(jax.random.key(self._seed), state.step)
        others = {k: group.params for k, group in state.groups.items() if k != name}
        trained, loss_state, metrics = self._update_group(
            self._groups[name],
            state.groups[name],
            state.step,
            batch,
            _group_key(key, list(self._groups).index(name)),
            state.loss_state,
            {**frozen, **others},
        )
        prefix = f"{name}_" if len(self._groups) > 1 else ""
        step = state.step + 1 if counts else state.step
        return (
            TrainState(step, {**state.groups, name: trained}, loss_state),
            {prefix + k: value for k, value in metrics.items()},
        )

    def _update_group(
        self,
        group: Group,
        trained: Trained,
        step: Array,
        batch: Any,
        key: Array,
        loss_state: Any,
        frozen: Mapping[str, Params],
    ) -> tuple[Trained, Any, Metrics]:
        """Updates one group.

        A non-finite update is skipped: only `bad_steps` and the loss state change. (Selecting the
        loss state here would hold two copies of the error buffers.)
        """
        # 1. Loss and gradient of the float32 parameters.
        quantize_for_loss = group.prepare(trained.params)

        def loss_fn(params: Params, batch: Any, key: Array, loss_state: Any):
            return group.loss(quantize_for_loss(params, key), batch, key, loss_state, frozen)

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if self._accumulate > 1:
            grad_fn = accumulated(grad_fn, self._accumulate, group.microbatch_weight)
        (loss, (metrics, loss_state)), grads = grad_fn(trained.params, batch, key, loss_state)

        # 2. Optimizer and EMA.
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = group.tx.update(grads, trained.opt_state, trained.params)
        params = optax.apply_updates(trained.params, updates)
        ema = trained.ema
        if group.ema is not None:
            decay = jnp.where(step < group.ema.start, 0.0, group.ema.decay)
            ema = optax.incremental_update(params, trained.ema, 1 - decay)

        # 3. The old values if the update is not finite.
        old = (trained.params, trained.ema, trained.opt_state)
        params, ema, opt_state = _select(finite, (params, ema, opt_state), old)
        bad_steps = jnp.where(finite, 0, trained.bad_steps + 1)
        metrics = metrics | {"loss": loss, "grad_norm": norm, "bad_steps": bad_steps}
        return Trained(params, ema, opt_state, bad_steps), loss_state, metrics


def _in_turn(
    programs: tuple[Update, ...], state: TrainState, frozen: Mapping[str, Params], batch: Any
) -> tuple[TrainState, Metrics]:
    """Runs the programs one after the other; each sees the new parameters of those before it."""
    metrics: Metrics = {}
    for program in programs:
        state, own = program(state, frozen, batch)
        metrics |= own
    return state, metrics


def accumulated(grad_fn, num_microbatches: int, weight: MicrobatchWeight):
    """`grad_fn` applied to the microbatches in a scan, through which the loss state passes.

    Losses, metrics and gradients are weighted means in float32; the mean of a metric is over the
    microbatches where it is finite.
    """

    def mean(params: Params, batch: Any, key: Array, loss_state: Any):
        def evaluate(loss_state: Any, xs):
            microbatch, key, share = xs
            (loss, (metrics, loss_state)), grads = grad_fn(params, microbatch, key, loss_state)
            shares = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), share, 0.0), metrics)
            metrics = jax.tree.map(lambda x, w: w * jnp.where(w > 0, x, 0.0), metrics, shares)
            weighted = jax.tree.map(lambda x: share * x, (loss, grads))
            return loss_state, (*weighted, metrics, shares)

        def add(carry, xs):
            loss_state, sums = carry
            loss_state, terms = evaluate(loss_state, xs)
            return (loss_state, jax.tree.map(jnp.add, sums, terms)), None

        # 1. Microbatches, their keys and their shares of the mean.
        microbatches = _microbatches(batch, num_microbatches)
        weights = jax.vmap(weight)(microbatches)
        shares = weights / jnp.maximum(weights.sum(), 1e-30)
        xs = (microbatches, jax.random.split(key, num_microbatches), shares)

        # 2. Weighted sums over the microbatches.
        _, shapes = jax.eval_shape(evaluate, loss_state, jax.tree.map(lambda x: x[0], xs))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (loss_state, sums), _ = lax.scan(add, (loss_state, zeros), xs)
        loss, grads, metrics, shares = sums
        return (loss, (jax.tree.map(jnp.divide, metrics, shares), loss_state)), grads

    return mean


def _microbatches(batch: Any, count: int) -> Any:
    """Reshapes [count * b, ...] to [count, b, ...], so that every device keeps its own rows."""

    def split(x: Array) -> Array:
        return jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def _select(finite: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)


def _group_key(key: Array, index: int) -> Array:
    """The key of the group number `index`; the first group uses `key` itself."""
    return key if index == 0 else jax.random.fold_in(key, _GROUP_STREAM + index)
