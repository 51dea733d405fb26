"""A small training run as a program that tests can kill.

    toy_run.py WORKDIR STEPS DELAY [HOSTS]

It trains a regression on all devices, or two groups of parameters on the first.

    DELAY: seconds per batch, to leave time to interrupt the run; or `fail=K`, which makes the last
      process fail at step K.
    HOSTS: as in `longlive train`; or `two_groups`, to train the second group in every step and the
      first in every fifth (`toy_task.two_groups_task`).

In the regression every process reports one skipped sample per row that it loads.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from longlive_jax.parallel.hosts import Hosts, abort_on_failure, join
from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.spec import Failure
from longlive_jax.training.feed import feed_in_order, process_rows
from longlive_jax.training.loop import LoopSpec, train
from longlive_jax.training.optim import OptimSpec, make_optimizer
from longlive_jax.training.task import Task, process_batches
from longlive_jax.training.update import EMASpec, Group, Trainer, stateless
from tests.longlive_jax.training import toy_task

ROWS = 8
WIDTH = 256  # so large that checkpoints store the arrays in data files, not in their index


class Batches:
    """This process's rows of batches that are a function of the step."""

    def __init__(self, steps: int, rows: range, delay: str):
        self.steps, self.rows, self.delay = steps, rows, delay

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i):
        if self.delay.startswith("fail="):
            if int(i) == int(self.delay[5:]) and jax.process_index() == jax.process_count() - 1:
                raise OSError(f"the data of step {int(i)} cannot be read")
        else:
            time.sleep(float(self.delay))
        x = np.random.default_rng(int(i)).normal(size=(ROWS, 4)).astype(np.float32)
        return {"x": x[self.rows.start : self.rows.stop]}


@stateless
def loss_fn(params, batch, key):
    x = batch["x"]
    noise = 0.01 * jax.random.normal(key, (len(x), 1))
    prediction = jnp.tanh(x @ params["w"]["kernel"]) @ params["v"]["kernel"]
    return jnp.mean((prediction - x.sum(1, keepdims=True) - noise) ** 2), {}


def init(key):
    keys = jax.random.split(key)
    return {
        "w": {"kernel": jax.random.normal(keys[0], (4, WIDTH))},
        "v": {"kernel": jax.random.normal(keys[1], (WIDTH, 1)) * WIDTH**-0.5},
    }


RULES = ((r"w/kernel", P(None, ("fsdp", "sp"))), (r"v/kernel", P(("fsdp", "sp"))))


def make_trainer(mesh, rules=RULES):
    tx = make_optimizer(OptimSpec(lr=1e-2), 20)
    return Trainer({"toy": Group(init, loss_fn, tx, EMASpec(), rules)}, mesh)


def regression_task(steps: int, delay: str) -> Task:
    count = jax.device_count()
    mesh = make_mesh(MeshSpec(*((1, 1, 1) if count == 1 else (count // 2, 2, 1))))
    rows = process_rows(mesh, ROWS)
    batches = feed_in_order(Batches(steps, rows, delay))

    def skipping_feed(start):
        feed = batches(start)
        feed.skipped = len(rows)
        return feed

    return Task(
        trainer=make_trainer(mesh),
        batches=process_batches(skipping_feed, mesh, P(("data", "fsdp")), batch_size=ROWS),
        evaluate=lambda weights, step, workdir: {},
        export=lambda weights, directory: None,
    )


class Points:
    """The batches of `toy_task.Batches`, each after `delay` seconds."""

    def __init__(self, steps: int, delay: str):
        self.steps, self.delay = steps, delay

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i):
        time.sleep(float(self.delay))
        return toy_task.Batches(self.steps)[i]


def two_groups_task(steps: int, delay: str) -> Task:
    return toy_task.two_groups_task(Points(steps, delay))


def run(workdir: str, steps: str, delay: str, make_task=regression_task, save_every=5) -> int:
    loop = LoopSpec(steps=int(steps), log_every=1, save_every=save_every)
    state = train(make_task(int(steps), delay), Path(workdir), loop)
    print(f"done at step {int(state.step)}")
    return 0


def main(workdir: str, steps: str, delay: str, hosts: str = "") -> int:
    if hosts in ("", "two_groups"):
        # Two groups are also saved in the middle of a cycle of updates.
        options = (two_groups_task, toy_task.RATIO - 1) if hosts else ()
        try:
            return run(workdir, steps, delay, *options)
        except Failure as error:
            print(error)
            return error.code
    join(Hosts.parse(hosts))
    return abort_on_failure(lambda: run(workdir, steps, delay))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
