"""Toy tasks: a regression with one group of parameters, and two groups updated 1 to 5."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.training.feed import feed_in_order
from longlive_jax.training.optim import OptimSpec, make_optimizer
from longlive_jax.training.task import Task, global_batches
from longlive_jax.training.update import EMASpec, Group, LossState, Trainer, stateless

OPTIM = OptimSpec(lr=1e-2, weight_decay=0.0, clip=1.0)
EMA = EMASpec(decay=0.9, start=3)
RATIO = 5
TEACHER = {"teacher": {"kernel": np.float32([1.0, -1.0])}}
"""Frozen parameters of the task with two groups."""


class Batches:
    """Batches of points [8, 2] by step; those of the steps in `poison` are NaN."""

    def __init__(self, steps, poison=()):
        self.steps, self.poison = steps, poison

    def __len__(self):
        return self.steps

    def __getitem__(self, i):
        x = np.random.default_rng(int(i)).normal(size=(8, 2)).astype(np.float32)
        return x * np.nan if int(i) in self.poison else x


def one_device():
    return make_mesh(MeshSpec(), jax.devices()[:1])


@stateless
def regression(params, x, key):
    """Mean squared error of the sum of a point's coordinates."""
    noise = 0.01 * jax.random.normal(key, (len(x),))
    error = x @ params["kernel"] - x.sum(1) - noise
    return jnp.mean(error**2), {"error": jnp.abs(error).mean()}


def group(loss=regression, **options):
    """The `Group` of a linear model [2]; `options` override its fields."""
    fields = {
        "init": lambda key: {"kernel": jax.random.normal(key, (2,))},
        "loss": loss,
        "tx": make_optimizer(OPTIM, 10),
        "ema": EMA,
    }
    return Group(**fields | options)


def trainer(loss=regression, mesh=None, *, accumulate=1, loss_state=None, **options):
    """The `Trainer` of the single group "model"; `options` override fields of that `Group`."""
    groups = {"model": group(loss, **options)}
    mesh = one_device() if mesh is None else mesh
    return Trainer(groups, mesh, accumulate=accumulate, loss_state=loss_state)


def toy_task(steps, poison=(), **fields):
    """The regression as a `Task`; `fields` override its fields."""
    mesh = one_device()
    defaults = {
        "trainer": trainer(mesh=mesh),
        "batches": global_batches(feed_in_order(Batches(steps, poison)), mesh),
        "evaluate": lambda weights, step, workdir: {
            "held_out": float(weights["model"]["kernel"].sum())
        },
        "export": lambda weights, directory: None,
    }
    return Task(**defaults | fields)


def critic_loss(params, x, key, loss_state, frozen):
    """Squared distance to generator + teacher; counts its evaluations in the loss state."""
    target = frozen["generator"]["kernel"] + frozen["teacher"]["kernel"]
    noise = 0.01 * jax.random.normal(key, target.shape)
    return jnp.sum((params["kernel"] - target - noise) ** 2), (
        {"count": loss_state},
        loss_state + 1,
    )


def generator_loss(params, x, key, loss_state, frozen):
    """Regression error of generator + 0.1 critic; counts its evaluations in the loss state."""
    error = x @ (params["kernel"] + 0.1 * frozen["critic"]["kernel"]) - x.sum(1)
    noise = 0.01 * jax.random.normal(key, error.shape)
    return jnp.mean((error - noise) ** 2), ({"count": loss_state}, loss_state + 1)


def one_to_five(step):
    """Groups of a step: the critic in every step, the generator before it in every fifth."""
    return ("generator", "critic") if step % RATIO == 0 else ("critic",)


def two_groups(mesh=None, *, seed=0):
    """The `Trainer` of a generator and a critic, whose loss state counts the losses evaluated."""
    groups = {"generator": group(generator_loss), "critic": group(critic_loss, ema=None)}
    counter = LossState(lambda: jnp.int32(0), P())
    mesh = one_device() if mesh is None else mesh
    return Trainer(groups, mesh, seed=seed, loss_state=counter)


def two_groups_task(batches, **fields):
    """`two_groups` as a `Task`, on batches by step; `fields` override its fields."""
    mesh = one_device()
    defaults = {
        "trainer": two_groups(mesh),
        "batches": global_batches(feed_in_order(batches), mesh),
        "evaluate": lambda weights, step, workdir: {},
        "export": lambda weights, directory: None,
        "updates": one_to_five,
        "frozen": jax.device_put(TEACHER),
    }
    return Task(**defaults | fields)
