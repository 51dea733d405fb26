"""A small run as a program of its own, to be killed: `toy_run.py WORKDIR STEPS DELAY [HOSTS]`.

A regression over all devices there are; DELAY seconds a batch leave time to interfere. `HOSTS` as
in `longlive train`; `fail=K` instead of a number of DELAY makes the last process fail at step K.
For every row of a batch one sample counts as skipped.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from longlive_jax.parallel.hosts import Hosts, join, leave_at_once
from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.spec import Failure
from longlive_jax.training.feed import feed_in_order, own_rows
from longlive_jax.training.loop import LoopSpec, Task, train
from longlive_jax.training.optim import OptimSpec
from longlive_jax.training.step import EMASpec, stateless

ROWS = 8
WIDTH = 256  # too wide for a save to keep its arrays in its index


class Batches:
    """This process's rows of a batch that is a function of the step."""

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
    guess = jnp.tanh(x @ params["w"]["kernel"]) @ params["v"]["kernel"]
    return jnp.mean((guess - x.sum(1, keepdims=True) - noise) ** 2), {}


def init(key):
    keys = jax.random.split(key)
    return {
        "w": {"kernel": jax.random.normal(keys[0], (4, WIDTH))},
        "v": {"kernel": jax.random.normal(keys[1], (WIDTH, 1)) * WIDTH**-0.5},
    }


def run(workdir: str, steps: str, delay: str) -> int:
    count = jax.device_count()
    mesh = make_mesh(MeshSpec(*((1, 1, 1) if count == 1 else (count // 2, 2, 1))))
    rows = own_rows(mesh, ROWS)
    batches = feed_in_order(Batches(int(steps), rows, delay))

    def feed(start):
        begun = batches(start)
        begun.skipped = len(rows)
        return begun

    task = Task(
        init=init,
        loss_fn=loss_fn,
        feed=feed,
        evaluate=lambda params, step, workdir: {},
        export=lambda params, directory: None,
        rules=((r"w/kernel", P(None, ("fsdp", "sp"))), (r"v/kernel", P(("fsdp", "sp")))),
        rows=ROWS,
    )
    loop = LoopSpec(steps=int(steps), log_every=1, save_every=5)
    state = train(
        task, Path(workdir), loop=loop, optim=OptimSpec(lr=1e-2), ema=EMASpec(), mesh=mesh
    )
    print(f"done at step {int(state.step)}")
    return 0


def main(workdir: str, steps: str, delay: str, hosts: str = "") -> int:
    if not hosts:
        try:
            return run(workdir, steps, delay)
        except Failure as error:
            print(error)
            return error.code
    join(Hosts.parse(hosts))
    return leave_at_once(lambda: run(workdir, steps, delay))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
