"""The training loop: resuming, divergence, metrics, evaluations, full disks."""

import json
import struct
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from longlive_jax.spec import Failure, UserError
from longlive_jax.training import loop as loop_module
from longlive_jax.training.feed import feed_in_order
from longlive_jax.training.loop import LoopSpec, train
from longlive_jax.training.metrics import MetricsLog
from longlive_jax.training.task import About, StepCost, global_batches
from tests.longlive_jax.training.toy_task import (
    Batches,
    one_device,
    one_to_five,
    toy_task,
    trainer,
    two_groups_task,
)


def spec(**changes):
    return LoopSpec(**{"steps": 10, "log_every": 2, "save_every": 5, "eval_every": 5} | changes)


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_resumed_equals_uninterrupted(tmp_path):
    uninterrupted = train(toy_task(10), tmp_path / "uninterrupted", spec())

    class Stop(Exception):
        pass

    class Interrupted(Batches):
        def __getitem__(self, i):
            if int(i) == 9:
                raise Stop
            return super().__getitem__(i)

    feed = global_batches(feed_in_order(Interrupted(10)), one_device())
    with pytest.raises(Exception):  # noqa: B017 - the data worker wraps what it raises
        train(toy_task(10, batches=feed), tmp_path / "resumed", spec())
    resumed = train(toy_task(10), tmp_path / "resumed", spec())
    chex.assert_trees_all_equal(uninterrupted, resumed)
    assert [r["step"] for r in records(tmp_path / "resumed") if "loss" in r] == [2, 4, 6, 8, 10]
    assert (tmp_path / "resumed/curves.png").stat().st_size > 1000


def test_consecutive_non_finite_updates_stop_the_run(tmp_path):
    rarely_logged = spec(patience=3, log_every=10)  # divergence is noticed between records
    with pytest.raises(FloatingPointError, match="in 4 consecutive updates before step 9"):
        train(toy_task(10, poison=range(5, 10)), tmp_path, rarely_logged)


def test_the_error_names_the_group_that_diverged(tmp_path):
    """The generator is updated in steps 1, 6 and 11; only its loss reads the batch."""
    task = two_groups_task(Batches(12, poison=(5, 10)))
    with pytest.raises(FloatingPointError, match=r"of generator was not finite in 2 .* step 11"):
        train(task, tmp_path, spec(steps=12, patience=2, log_every=1))


def test_a_record_has_the_metrics_of_every_group_updated_since_the_last(tmp_path):
    task = two_groups_task(Batches(9))
    train(task, tmp_path, spec(steps=9, log_every=3, save_every=9, eval_every=0))
    logged = [r for r in records(tmp_path) if "steps_per_s" in r]
    assert [(r["step"], "generator_loss" in r) for r in logged] == [(3, 1), (6, 1), (9, 0)]
    assert all("critic_loss" in r for r in logged)
    assert logged[0]["generator_count"] == 0 and logged[0]["critic_count"] == (1 + 2 + 3) / 3


def test_a_skipped_update_is_left_out_of_the_means_of_a_record(tmp_path):
    train(toy_task(4, poison=[2]), tmp_path, spec(steps=4, log_every=4))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    logged = [json.loads(line, parse_constant=refuse) for line in lines]
    assert logged[0]["loss"] > 0 and logged[0]["bad_steps"] == 0.25


def test_an_unfinished_first_checkpoint_is_ignored(tmp_path):
    """The run starts from the weights that `restore` reads, not from random ones."""
    (tmp_path / "state/5.orbax-checkpoint-tmp").mkdir(parents=True)
    pretrained = trainer(restore=lambda: {"kernel": jnp.array([5.0, 5.0])})
    state = train(toy_task(1, trainer=pretrained), tmp_path, spec(steps=1))
    kernel = np.asarray(state.groups["model"].params["kernel"])
    assert (np.abs(kernel - 5) < 0.1).all()


def test_initial_weights_are_not_read_when_resuming(tmp_path):
    reads = []

    def restore():
        reads.append(1)
        return {"kernel": jnp.array([5.0, 5.0])}

    for steps in (5, 10):
        train(toy_task(steps, trainer=trainer(restore=restore)), tmp_path, spec(steps=steps))
    assert len(reads) == 1


def test_a_failed_checkpoint_is_reported_even_if_plotting_fails_too(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def refuse(*_):
        raise Failure("free disk space")

    monkeypatch.setattr(loop_module, "plot_curves", full)
    monkeypatch.setattr(loop_module.TrainCheckpoints, "save", refuse)
    with pytest.raises(Failure, match="free disk space"):
        train(toy_task(10), tmp_path, spec(eval_every=0))


def scalars(workdir):
    """All scalars in TensorBoard's files: (step, name) -> value.

    A record in such a file is its length, a CRC, the event and another CRC.
    """
    values = {}
    for path in (workdir / "tensorboard").iterdir():
        data, offset = path.read_bytes(), 0
        while offset < len(data):
            (length,) = struct.unpack_from("<Q", data, offset)
            event = event_pb2.Event.FromString(data[offset + 12 : offset + 12 + length])
            values |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
            offset += 16 + length
    return values


def test_records_contain_throughput_and_skipped_samples_and_tensorboard_agrees(tmp_path):
    cost = StepCost(tokens=100, flops=6e9, kinds={"linears": 4e9, "attention": 2e9})
    train(toy_task(4, about=About(cost=cost)), tmp_path, spec(steps=4, peak_tflops=0.5))
    logged = [r for r in records(tmp_path) if "loss" in r]
    board = scalars(tmp_path)
    for record in logged:
        rate = record["steps_per_s"]
        assert record["tokens_per_s"] == pytest.approx(100 * rate, rel=1e-4)
        assert record["tflops_per_s"] == pytest.approx(0.006 * rate, rel=1e-3)
        assert record["tflops_per_s_linears"] == pytest.approx(0.004 * rate, rel=1e-3)
        assert record["percent_of_peak"] == pytest.approx(1.2 * rate, rel=1e-4)
        assert record["skipped"] == 0 and record["grad_norm"] > 0 and "data_wait" in record
        for name, value in record.items():
            if name != "step":
                assert board[record["step"], name] == pytest.approx(value, rel=1e-4, abs=2e-6)
    assert len(logged) == 2 and (4, "held_out") in board


def test_a_full_disk_while_logging_is_a_failure_with_a_remedy(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop_module.MetricsLog, "write", full)
    with pytest.raises(Failure, match=r"cannot be written .*No space.*newest checkpoint: none"):
        train(toy_task(10), tmp_path, spec())


def test_an_interrupted_evaluation_is_repeated_on_resuming(tmp_path):
    def interrupt(weights, step, workdir):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # step 5 has a checkpoint, but no evaluation
        train(toy_task(5, evaluate=interrupt), tmp_path, spec(steps=5))
    for _ in range(2):  # repeated in the first of these runs only
        train(toy_task(5), tmp_path, spec(steps=5))
        assert [r["step"] for r in records(tmp_path) if "held_out" in r] == [5]


def test_rates_exclude_checkpoints_and_evaluations(tmp_path):
    """The rate is at most that of the input pipeline, and above that with evaluations included."""
    delay, mesh = 0.02, one_device()
    batches = global_batches(feed_in_order(Batches(20)), mesh)

    def put(batch):
        time.sleep(delay)
        return batches.put(batch)

    def evaluate(weights, step, workdir):
        time.sleep(0.5)
        return {}

    slow = toy_task(
        20, batches=type(batches)(batches.feed, put), evaluate=evaluate, trainer=trainer(mesh=mesh)
    )
    train(slow, tmp_path, spec(steps=20, log_every=10, save_every=7, eval_every=6))
    second = next(r for r in records(tmp_path) if r["step"] == 20 and "steps_per_s" in r)
    assert 10 / (10 * delay + 1.0) < second["steps_per_s"] <= 1.05 / delay
    assert second["data_wait"] <= 1.0


def test_resuming_over_other_frozen_parameters_is_refused(tmp_path):
    def train_over(steps, value):
        frozen = {"teacher": jax.device_put({"kernel": np.full(2, value, np.float32)})}
        return train(toy_task(steps, frozen=frozen), tmp_path, spec(steps=steps))

    train_over(5, 1.0)
    assert int(train_over(7, 1.0).step) == 7
    with pytest.raises(UserError, match=r"frozen parameters are not those of step 7: teacher\."):
        train_over(9, 2.0)


def test_seconds_of_each_kind_of_step_are_logged(tmp_path):
    task = two_groups_task(Batches(12), updates=one_to_five)
    train(task, tmp_path, spec(steps=12, log_every=12))
    (record,) = (r for r in records(tmp_path) if "steps_per_s" in r)
    kinds = {name for name in record if name.startswith("seconds_")}
    assert kinds == {"seconds_critic", "seconds_generator_and_critic"}
    assert all(0 < record[name] < 10 for name in kinds)


def test_a_non_finite_metric_is_left_out_of_both_logs(tmp_path, caplog):
    log = MetricsLog(tmp_path)
    log.write(1, {"loss": 0.5, "level": float("nan")})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}
    assert scalars(tmp_path) == {(1, "loss"): 0.5} and not caplog.records


def test_settings_below_their_minimum_are_refused():
    with pytest.raises(ValueError, match=r"loop\.patience must be >= 1, got 0"):
        LoopSpec(patience=0)
