"""The loop on a toy regression: resuming, dropped updates, schedules, averages."""

import dataclasses
import json
import struct
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tensorboardX.proto import event_pb2

from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.spec import Failure
from longlive_jax.training import loop as loop_module
from longlive_jax.training.feed import feed_in_order
from longlive_jax.training.loop import LoopSpec, Task, Work, train
from longlive_jax.training.metrics import MetricsLog
from longlive_jax.training.optim import OptimSpec, make_optimizer, matrix_axes, schedule
from longlive_jax.training.state import init_state
from longlive_jax.training.step import EMASpec, make_train_step, stateless

OPTIM = OptimSpec(lr=1e-2, weight_decay=0.0, clip=1.0)
EMA = EMASpec(decay=0.9, start=3)


class Batches:
    """Points of a line, another few at every step; `poison` steps hold a NaN."""

    def __init__(self, steps, poison=()):
        self.steps, self.poison = steps, poison

    def __len__(self):
        return self.steps

    def __getitem__(self, i):
        x = np.random.default_rng(int(i)).normal(size=(8, 2)).astype(np.float32)
        return x * np.nan if int(i) in self.poison else x


@stateless
def loss_fn(params, x, key):
    noise = 0.01 * jax.random.normal(key, (len(x),))
    error = x @ params["kernel"] - x.sum(1) - noise
    return jnp.mean(error**2), {"error": jnp.abs(error).mean()}


def task(steps, poison=()):
    return Task(
        init=lambda key: {"kernel": jax.random.normal(key, (2,))},
        loss_fn=loss_fn,
        feed=feed_in_order(Batches(steps, poison)),
        evaluate=lambda params, step, workdir: {"held_out": float(params["kernel"].sum())},
        export=lambda params, directory: None,
    )


def spec(**kw):
    return LoopSpec(**{"steps": 10, "log_every": 2, "save_every": 5, "eval_every": 5} | kw)


def test_resumed_equals_uninterrupted(tmp_path):
    whole = train(task(10), tmp_path / "whole", loop=spec(), optim=OPTIM, ema=EMA)

    class Stop(Exception):
        pass

    class Interrupted(Batches):
        def __getitem__(self, i):
            if int(i) == 9:
                raise Stop
            return super().__getitem__(i)

    broken = Task(**vars(task(10)) | {"feed": feed_in_order(Interrupted(10))})
    with pytest.raises(Exception):  # noqa: B017 - the data worker wraps what it raises
        train(broken, tmp_path / "parts", loop=spec(), optim=OPTIM, ema=EMA)
    resumed = train(task(10), tmp_path / "parts", loop=spec(), optim=OPTIM, ema=EMA)
    chex.assert_trees_all_equal(whole, resumed)
    logged = [json.loads(x) for x in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in logged if "loss" in r]
    assert steps == [2, 4, 6, 8, 10]
    assert (tmp_path / "parts/curves.png").stat().st_size > 1000


def test_non_finite_updates_change_nothing_and_then_stop_the_run(tmp_path):
    tx = make_optimizer(OPTIM, 10)
    step = make_train_step(loss_fn, tx, EMA)
    state, _ = step(init_state({"kernel": jnp.ones(2)}, tx), Batches(1)[0])
    before = jax.tree.map(np.array, (state.params, state.ema, state.opt_state))
    state, metrics = step(state, Batches(1, poison=[0])[0])
    chex.assert_trees_all_equal((state.params, state.ema, state.opt_state), before)
    assert int(state.step) == 2 and int(metrics["bad_steps"]) == 1
    state, metrics = step(state, Batches(1)[0])
    assert int(metrics["bad_steps"]) == 0
    rare = spec(patience=3, log_every=10)  # a record is not what it waits for
    with pytest.raises(FloatingPointError, match="in 4 updates in a row before step 9"):
        train(task(10, poison=range(5, 10)), tmp_path, loop=rare, optim=OPTIM, ema=EMA)


def test_a_dropped_update_leaves_the_others_in_the_record(tmp_path):
    train(task(4, poison=[2]), tmp_path, loop=spec(steps=4, log_every=4), optim=OPTIM, ema=EMA)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    logged = [json.loads(line, parse_constant=refuse) for line in lines]
    assert logged[0]["loss"] > 0 and logged[0]["bad_steps"] == 0.25


def test_a_first_save_that_was_cut_off_is_none(tmp_path):
    """The run begins where it would have, not from random parameters."""
    (tmp_path / "state/5.orbax-checkpoint-tmp").mkdir(parents=True)
    begun = dataclasses.replace(task(1), start=lambda: {"kernel": jnp.array([5.0, 5.0])})
    state = train(begun, tmp_path, loop=spec(steps=1), optim=OPTIM, ema=EMA)
    assert (np.abs(np.asarray(state.params["kernel"]) - 5) < 0.1).all()


def test_the_message_of_a_failed_save_is_not_lost_to_a_full_disk(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop_module, "plot_curves", full)
    monkeypatch.setattr(loop_module.Saves, "save", lambda self, *_: self.check_room(None) or stop())

    def stop():
        raise Failure("make room")

    with pytest.raises(Failure, match="make room"):
        train(task(10), tmp_path, loop=spec(eval_every=0), optim=OPTIM, ema=EMA)


def scalars(workdir):
    """(step, name) -> value of all that TensorBoard got: records of length, its crc, event, crc."""
    found = {}
    for path in (workdir / "tensorboard").iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            found |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
            at += 16 + length
    return found


def test_records_have_speeds_memory_and_skipped_samples_and_tensorboard_has_the_same(tmp_path):
    work = Work(tokens=100, flops=6e9, kinds={"linears": 4e9, "attention": 2e9})
    told = dataclasses.replace(task(4), work=work)
    train(told, tmp_path, loop=spec(steps=4, peak_tflops=0.5), optim=OPTIM, ema=EMA)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    records = [r for r in lines if "loss" in r]
    board = scalars(tmp_path)
    for record in records:
        rate = record["steps_per_s"]
        assert record["tokens_per_s"] == pytest.approx(100 * rate, rel=1e-4)
        assert record["tflops_per_s"] == pytest.approx(0.006 * rate, rel=1e-3)
        assert record["tflops_per_s_linears"] == pytest.approx(0.004 * rate, rel=1e-3)
        assert record["percent_of_peak"] == pytest.approx(1.2 * rate, rel=1e-4)
        assert record["skipped"] == 0 and record["grad_norm"] > 0 and "data_wait" in record
        for name, value in record.items():
            if name != "step":
                assert board[record["step"], name] == pytest.approx(value, rel=1e-4, abs=2e-6)
    assert len(records) == 2 and (4, "held_out") in board


def test_a_full_disk_while_logging_is_one_message(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop_module.MetricsLog, "write", full)
    with pytest.raises(Failure, match=r"cannot be written .*No space.*nothing is saved yet"):
        train(task(10), tmp_path, loop=spec(), optim=OPTIM, ema=EMA)


def test_an_evaluation_that_a_kill_came_before_is_made_up_for(tmp_path):
    def killed(params, step, workdir):
        raise KeyboardInterrupt

    cut = dataclasses.replace(task(5), evaluate=killed)
    with pytest.raises(KeyboardInterrupt):  # the save of this step is there, its evaluation is not
        train(cut, tmp_path, loop=spec(steps=5), optim=OPTIM, ema=EMA)
    for _ in range(2):  # made up for once
        train(task(5), tmp_path, loop=spec(steps=5), optim=OPTIM, ema=EMA)
        lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        assert [r["step"] for r in lines if "held_out" in r] == [5]


def test_rates_count_updates_and_not_what_lies_between(tmp_path):
    """Saves and evaluations inside of a window: an update is not faster than what it waits for."""
    delay = 0.02

    def place(batch):
        time.sleep(delay)
        return jnp.asarray(batch)

    def evaluate(params, step, workdir):
        time.sleep(0.5)
        return {}

    slow = dataclasses.replace(task(20), place=place, evaluate=evaluate)
    rhythm = spec(steps=20, log_every=10, save_every=7, eval_every=6)
    train(slow, tmp_path, loop=rhythm, optim=OPTIM, ema=EMA)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    second = next(r for r in lines if r["step"] == 20 and "steps_per_s" in r)
    assert 10 / (10 * delay + 1.0) < second["steps_per_s"] <= 1.05 / delay
    assert second["data_wait"] <= 1.0


def test_average_copies_until_its_start():
    tx = make_optimizer(OPTIM, 10)
    step = make_train_step(loss_fn, tx, EMA)
    state = init_state({"kernel": jnp.zeros(2)}, tx)
    for i in range(3):
        state, _ = step(state, Batches(9)[i])
        chex.assert_trees_all_close(state.ema, state.params)
    old = np.array(state.ema["kernel"])
    state, _ = step(state, Batches(9)[3])
    want = 0.9 * old + 0.1 * np.array(state.params["kernel"])
    chex.assert_trees_all_close(state.ema["kernel"], want, rtol=1e-6)


def test_accumulation_is_one_update_by_the_mean_gradient():
    tx = make_optimizer(OPTIM, 10)

    @stateless
    def still(params, x, key):
        error = x @ params["kernel"] - x.sum(1)
        return jnp.mean(error**2), {"error": jnp.abs(error).mean()}

    states = []
    for parts in (1, 4):
        state = init_state({"kernel": jnp.zeros(2)}, tx)
        step = make_train_step(still, tx, EMA, accumulate=parts)
        for i in range(3):
            state, metrics = step(state, Batches(9)[i])
        states.append((state, metrics))
    chex.assert_trees_all_close(*states, rtol=1e-6)


def test_parts_count_for_what_they_hold():
    """Padding in one part does not make the frames of that part heavier than others."""
    tx = make_optimizer(OPTIM, 10)

    @stateless
    def masked(params, batch, key):
        error = (batch["x"] @ params["kernel"] - 1) ** 2
        return jnp.sum(error * batch["mask"]) / jnp.sum(batch["mask"]), {}

    x = jax.random.normal(jax.random.key(0), (8, 2))
    batch, states = {"x": x, "mask": jnp.array([1.0, 0, 0, 0, 1, 0, 1, 1])}, []
    for parts in (1, 2):
        step = make_train_step(masked, tx, EMA, accumulate=parts, weigh=lambda b: b["mask"].sum())
        states.append(step(init_state({"kernel": jnp.zeros(2)}, tx), batch))
    chex.assert_trees_all_close(*states, rtol=1e-6)


def test_a_number_that_is_none_is_in_neither_log(tmp_path, caplog):
    log = MetricsLog(tmp_path)
    log.write(1, {"loss": 0.5, "level": float("nan")})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}
    assert scalars(tmp_path) == {(1, "loss"): 0.5} and not caplog.records


def test_a_metric_that_some_parts_lack_is_that_of_the_others():
    """As the error of a noise level that a part has no frame of; also of a part without weight."""
    tx = make_optimizer(OPTIM, 10)

    @stateless
    def loss(params, x, key):
        some = {"level": jnp.where(x[0, 0] > 1, x[0, 0], jnp.nan), "none": jnp.float32(jnp.nan)}
        return jnp.sum(params["kernel"] ** 2), {"all": x[0, 0]} | some

    step = make_train_step(loss, tx, EMA, accumulate=4, weigh=lambda x: x[0, 1])
    batch = jnp.array([[0.0, 2], [2, 1], [7, 0], [4, 3]])
    _, metrics = step(init_state({"kernel": jnp.ones(2)}, tx), batch)
    assert float(metrics["all"]) == pytest.approx((2 * 0 + 1 * 2 + 3 * 4) / 6)
    assert float(metrics["level"]) == pytest.approx((1 * 2 + 3 * 4) / 4)
    assert np.isnan(metrics["none"])


def test_accumulation_carries_the_memory_from_part_to_part():
    tx = make_optimizer(OPTIM, 10)

    def counting(params, x, key, memory):
        return jnp.sum(params["kernel"] ** 2), ({}, memory * 2 + x[0, 0])

    step = make_train_step(counting, tx, EMA, accumulate=4)
    state = init_state({"kernel": jnp.ones(2)}, tx, jnp.float32(1))
    state, _ = step(state, jnp.arange(4.0)[:, None])
    assert float(state.memory) == (((2 * 1 + 0) * 2 + 1) * 2 + 2) * 2 + 3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_mesh_changes_nothing_but_the_place(tmp_path, name):
    """Sharded parameters, moments and average; the numbers of one device."""
    optim = OptimSpec(name=name, lr=1e-2, b1=0.9, clip=1.0)

    @stateless
    def loss(params, x, key):
        error = jnp.tanh(x @ params["w"]["kernel"]) @ params["v"]["kernel"] - x.sum(
            1, keepdims=True
        )
        return jnp.mean(error**2), {}

    def init(key):
        keys = jax.random.split(key)
        return {
            "w": {"kernel": jax.random.normal(keys[0], (2, 8))},
            "v": {"kernel": jax.random.normal(keys[1], (8, 1))},
        }

    rules = ((r"w/kernel", P(None, ("fsdp", "sp"))), (r"v/kernel", P(("fsdp", "sp"))))
    made = {}
    for shape in ((1, 1, 1), (2, 2, 2)):
        mesh = make_mesh(MeshSpec(*shape), jax.devices()[: np.prod(shape)])
        work = Task(**vars(task(6)) | {"init": init, "loss_fn": loss, "rules": rules})
        work = dataclasses.replace(work, evaluate=lambda *_: {})
        folder = tmp_path / str(shape)
        made[shape] = train(work, folder, loop=spec(steps=6), optim=optim, ema=EMA, mesh=mesh)
    alone, shared = made.values()
    chex.assert_trees_all_close(jax.device_get(alone), jax.device_get(shared), rtol=1e-5, atol=1e-7)
    want = shared.params["w"]["kernel"].sharding
    assert want.spec == P(None, ("fsdp", "sp"))
    split = [x for x in jax.tree.leaves((shared.ema, shared.opt_state)) if x.shape == (2, 8)]
    assert len(split) >= 2 and all(x.sharding.is_equivalent_to(want, 2) for x in split)


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


@pytest.mark.parametrize("bad", [{"name": "sgd"}, {"decay": 1.5}])
def test_bad_optimizer_settings_are_named(bad):
    with pytest.raises(ValueError, match=r"sgd|1\.5"):
        OptimSpec(**bad)
