"""Updates: skipping, gradient accumulation, sharding, EMA and keys, with one or several groups."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from longlive_jax.bench.timing import Compilations
from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.training.optim import OptimSpec, make_optimizer
from longlive_jax.training.update import LossState, Trainer, stateless
from tests.longlive_jax.training.toy_task import (
    EMA,
    RATIO,
    TEACHER,
    Batches,
    group,
    one_device,
    one_to_five,
    trainer,
    two_groups,
)

MODEL = ("model",)


def run(trainer, batches, names=MODEL, frozen=None):
    """The state after one update per batch, and the metrics of the last update."""
    state, metrics = trainer.init(), {}
    for batch in batches:
        state, metrics = trainer.program(names)(state, frozen or {}, batch)
    return state, metrics


def test_a_non_finite_update_only_changes_its_counter():
    toy = trainer()
    state, _ = run(toy, [Batches(1)[0]])
    before = jax.tree.map(np.array, state.groups["model"])
    state, metrics = toy.program(MODEL)(state, {}, Batches(1, poison=[0])[0])
    chex.assert_trees_all_equal(state.groups["model"].replace(bad_steps=before.bad_steps), before)
    assert int(state.step) == 2 and int(metrics["bad_steps"]) == 1
    state, metrics = toy.program(MODEL)(state, {}, Batches(1)[0])
    assert int(metrics["bad_steps"]) == 0


def test_ema_equals_the_parameters_until_its_start():
    toy = trainer(init=lambda key: {"kernel": jnp.zeros(2)})
    state = toy.init()
    for i in range(3):
        state, _ = toy.program(MODEL)(state, {}, Batches(9)[i])
        chex.assert_trees_all_close(state.groups["model"].ema, state.groups["model"].params)
    old = np.array(state.groups["model"].ema["kernel"])
    state, _ = toy.program(MODEL)(state, {}, Batches(9)[3])
    want = 0.9 * old + 0.1 * np.array(state.groups["model"].params["kernel"])
    chex.assert_trees_all_close(state.groups["model"].ema["kernel"], want, rtol=1e-6)


def test_a_group_without_ema_is_evaluated_with_its_parameters():
    state, _ = run(trainer(ema=None), [Batches(1)[0]])
    trained = state.groups["model"]
    assert trained.ema is None and state.weights["model"] is trained.params


def test_accumulation_is_one_update_with_the_mean_gradient():
    @stateless
    def noiseless(params, x, key):
        error = x @ params["kernel"] - x.sum(1)
        return jnp.mean(error**2), {"error": jnp.abs(error).mean()}

    batches = [Batches(9)[i] for i in range(3)]
    results = [run(trainer(noiseless, accumulate=n), batches) for n in (1, 4)]
    chex.assert_trees_all_close(*results, rtol=1e-6)


def test_microbatches_are_weighted_by_their_number_of_unmasked_samples():
    """Every sample then has the same weight, however much padding its microbatch has."""

    @stateless
    def masked(params, batch, key):
        error = (batch["x"] @ params["kernel"] - 1) ** 2
        return jnp.sum(error * batch["mask"]) / jnp.sum(batch["mask"]), {}

    x = jax.random.normal(jax.random.key(0), (8, 2))
    batch = {"x": x, "mask": jnp.array([1.0, 0, 0, 0, 1, 0, 1, 1])}
    options = {"microbatch_weight": lambda b: b["mask"].sum()}
    results = [run(trainer(masked, accumulate=n, **options), [batch]) for n in (1, 2)]
    chex.assert_trees_all_close(*results, rtol=1e-6)


def test_a_metric_is_the_mean_of_the_microbatches_where_it_is_finite():
    """A noise level without a frame has no error, for instance. One microbatch has weight 0."""

    @stateless
    def loss(params, x, key):
        value = x[0, 0]
        metrics = {
            "all": value,
            "some": jnp.where(value > 1, value, jnp.nan),
            "none": jnp.float32(jnp.nan),
        }
        return jnp.sum(params["kernel"] ** 2), metrics

    toy = trainer(loss, accumulate=4, microbatch_weight=lambda x: x[0, 1])
    _, metrics = run(toy, [jnp.array([[0.0, 2], [2, 1], [7, 0], [4, 3]])])
    assert float(metrics["all"]) == pytest.approx((2 * 0 + 1 * 2 + 3 * 4) / 6)
    assert float(metrics["some"]) == pytest.approx((1 * 2 + 3 * 4) / 4)
    assert np.isnan(metrics["none"])


def test_accumulation_passes_the_loss_state_from_microbatch_to_microbatch():
    def counting(params, x, key, loss_state, frozen):
        return jnp.sum(params["kernel"] ** 2), ({}, loss_state * 2 + x[0, 0])

    toy = trainer(counting, accumulate=4, loss_state=LossState(lambda: jnp.float32(1), P()))
    state, _ = run(toy, [jnp.arange(4.0)[:, None]])
    assert float(state.loss_state) == (((2 * 1 + 0) * 2 + 1) * 2 + 2) * 2 + 3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_updates_on_a_mesh_equal_those_of_one_device(name):
    """Parameters, moments and EMA are sharded; their values are those of one device."""

    @stateless
    def loss(params, x, key):
        hidden = jnp.tanh(x @ params["w"]["kernel"])
        error = hidden @ params["v"]["kernel"] - x.sum(1, keepdims=True)
        return jnp.mean(error**2), {}

    def init(key):
        keys = jax.random.split(key)
        return {
            "w": {"kernel": jax.random.normal(keys[0], (2, 8))},
            "v": {"kernel": jax.random.normal(keys[1], (8, 1))},
        }

    rules = ((r"w/kernel", P(None, ("fsdp", "sp"))), (r"v/kernel", P(("fsdp", "sp"))))
    tx = make_optimizer(OptimSpec(name=name, lr=1e-2, b1=0.9, clip=1.0), 6)
    states = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        mesh = make_mesh(MeshSpec(*shape), jax.devices()[: np.prod(shape)])
        toy = trainer(loss, mesh, init=init, rules=rules, tx=tx)
        states.append(run(toy, [Batches(6)[i] for i in range(6)])[0])
    chex.assert_trees_all_close(*map(jax.device_get, states), rtol=1e-5, atol=1e-7)
    trained = states[1].groups["model"]
    sharding = trained.params["w"]["kernel"].sharding
    assert sharding.spec == P(None, ("fsdp", "sp"))
    sharded = [x for x in jax.tree.leaves((trained.ema, trained.opt_state)) if x.shape == (2, 8)]
    assert len(sharded) >= 2 and all(x.sharding.is_equivalent_to(sharding, 2) for x in sharded)


def test_parameters_that_do_not_divide_over_the_mesh_are_refused():
    mesh = make_mesh(MeshSpec(1, 4, 1), jax.devices()[:4])
    with pytest.raises(ValueError, match="does not split into 4"):
        trainer(mesh=mesh, rules=((r"kernel", P("fsdp")),))


def train_one_to_five(toy, steps, frozen=TEACHER, poison=()):
    """The state after `steps` steps of the schedule `one_to_five`, and the metrics of each."""
    state, history = toy.init(), []
    for step in range(steps):
        batch = Batches(steps, poison)[step]
        state, metrics = toy.program(one_to_five(step))(state, frozen, batch)
        history.append(jax.device_get(metrics))
    return state, history


def test_only_the_named_groups_are_updated():
    toy = two_groups()
    state, history = train_one_to_five(toy, RATIO)  # the generator is in the first step only
    generator = jax.device_get(state.groups["generator"])
    with_generator = [i for i, metrics in enumerate(history) if "generator_loss" in metrics]
    assert with_generator == [0] and all("critic_loss" in metrics for metrics in history)
    critic = np.array(state.groups["critic"].params["kernel"])
    state, _ = toy.program(("critic",))(state, TEACHER, Batches(9)[8])
    chex.assert_trees_all_equal(state.groups["generator"], generator)
    assert (np.array(state.groups["critic"].params["kernel"]) != critic).all()
    assert int(state.step) == RATIO + 1 and int(state.loss_state) == RATIO + 2


def test_a_group_sees_the_new_parameters_of_groups_updated_before_it():
    toy = two_groups()
    _, both = toy.program(("generator", "critic"))(toy.init(), TEACHER, Batches(1)[0])
    _, alone = toy.program(("critic",))(toy.init(), TEACHER, Batches(1)[0])
    _, last = toy.program(("critic", "generator"))(toy.init(), TEACHER, Batches(1)[0])
    assert both["critic_loss"] != alone["critic_loss"] == last["critic_loss"]


def test_every_group_counts_its_own_skipped_updates():
    toy = two_groups()
    state, _ = toy.program(("generator", "critic"))(toy.init(), TEACHER, Batches(1, [0])[0])
    counts = {name: int(trained.bad_steps) for name, trained in state.groups.items()}
    assert counts == {"generator": 1, "critic": 0}  # the critic does not read the batch


def test_frozen_parameters_are_neither_donated_nor_part_of_the_state():
    toy, teacher = two_groups(), jax.device_put(TEACHER)
    state, _ = train_one_to_five(toy, 2, teacher)
    assert not teacher["teacher"]["kernel"].is_deleted()
    assert set(state.groups) == {"generator", "critic"}


def test_each_group_is_compiled_once():
    toy, steps = two_groups(), 2 * RATIO + 1
    state, counts = toy.init(), []
    for step in range(steps):
        with Compilations() as compiled:
            update = toy.program(one_to_five(step))
            state, _ = update(state, TEACHER, Batches(steps)[step])
        counts.append(compiled.counts.total())
    assert counts == [2] + [0] * (steps - 1)


def test_keys_derive_from_seed_and_step_and_differ_between_groups():
    @stateless
    def uniform_loss(params, x, key):
        return jnp.sum(params["kernel"] ** 2), {"draw": jax.random.uniform(key)}

    def draws(seed):
        groups = {"a": group(uniform_loss), "b": group(uniform_loss)}
        toy = Trainer(groups, one_device(), seed=seed)
        state, values = toy.init(), []
        for i in range(2):
            state, metrics = toy.program(("a", "b"))(state, {}, Batches(2)[i])
            values += [float(metrics["a_draw"]), float(metrics["b_draw"])]
        return values

    first = draws(0)
    assert len(set(first)) == 4 and first == draws(0) and not set(first) & set(draws(1))

    # The key of a run's only group is that of the first of several.
    single = Trainer({"a": group(uniform_loss)}, one_device())
    key = jax.random.fold_in(jax.random.key(0), 0)
    _, metrics = single.program(("a",))(single.init(), {}, Batches(1)[0])
    assert float(metrics["draw"]) == float(jax.random.uniform(key)) == first[0]


def test_the_second_group_shares_no_key_with_the_first():
    """The first group's loss may split its key or fold small numbers into it, as steps do."""

    @stateless
    def reporting_loss(params, x, key):
        return jnp.sum(params["kernel"] ** 2), {"key": jax.random.key_data(key)}

    def init(key):
        return {"kernel": jax.random.uniform(key, (2,))}

    def derived(key):
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(100))

    groups = {name: group(reporting_loss, init=init) for name in ("a", "b")}
    toy = Trainer(groups, one_device())
    state = toy.init()
    initial = np.array(state.groups["b"].params["kernel"])
    _, metrics = toy.program(("a", "b"))(state, {}, Batches(1)[0])

    # 1. The key of an update, among those that derive from the first group's.
    keys = jax.random.key_data(derived(jax.random.wrap_key_data(metrics["a_key"])))
    assert not (np.array(keys) == np.array(metrics["b_key"])).all(axis=1).any()

    # 2. The key of the initial parameters, among those of the steps.
    draws = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(derived(jax.random.key(0)))
    assert not (np.array(draws) == initial).all(axis=1).any()


def test_ema_differs_from_the_parameters_after_its_start():
    state, _ = run(trainer(ema=EMA), [Batches(5)[i] for i in range(5)])
    ema, params = (
        np.array(x["kernel"]) for x in (state.groups["model"].ema, state.groups["model"].params)
    )
    assert (ema != params).all()
