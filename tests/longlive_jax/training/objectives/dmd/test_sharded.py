"""Both updates of distillation on any mesh equal those of one device."""

import dataclasses
import functools
from functools import partial

import jax
import numpy as np
import pytest

from longlive_jax.parallel import rules
from longlive_jax.parallel.mesh import AXES, MeshSpec, make_mesh
from longlive_jax.quant.frozen import fit_shards, freeze
from longlive_jax.quant.lora import LoRASpec
from longlive_jax.quant.policy import Format, QuantPolicy, Recipe, named
from longlive_jax.training.objectives.dmd.draws import RolloutSpec, ScoreSpec
from longlive_jax.training.objectives.dmd.roles import CRITIC, GENERATOR, trained_params
from longlive_jax.training.objectives.dmd.sharded import (
    ShardedDMD,
    role_specs,
    sharded_critic_loss,
    sharded_generator_loss,
)
from tests.longlive_jax.training.objectives.dmd.tiny_dmd import (
    ROLLOUT,
    adapter,
    critic,
    frozen_roles,
    generator,
    loss_and_gradient,
    relative_error,
    setup,
    videos,
    weights,
)

UPDATES = {
    "generator": (generator, sharded_generator_loss),
    "critic": (critic, sharded_critic_loss),
}
NEAREST = QuantPolicy(
    "nearest",
    (
        (
            r"blocks/(ffn/down|self_attn/q|cross_attn/k)/kernel",
            Format(tile=16, recipe=Recipe(frozen=True, stochastic=None)),
        ),
    ),
)
"""Three matrices without noise in the gradient, which differs between devices."""


@functools.cache
def sharded(*shape: int) -> ShardedDMD:
    spec = MeshSpec(*shape)
    mesh = make_mesh(spec, jax.devices()[: spec.size])
    return ShardedDMD(mesh, rules.specs_for(rules.DIT, weights(1)))


def roles_on(over_mesh: ShardedDMD, pack):
    """All roles as shards on their devices."""
    roles = frozen_roles(
        lambda params: fit_shards(pack(params, AXES), over_mesh.specs, over_mesh.mesh.shape)
    )

    def place(name, params):
        is_adapter = name in (GENERATOR, CRITIC)
        specs = rules.specs_for(rules.ADAPTER, params) if is_adapter else None
        specs = specs or role_specs(params, over_mesh.specs)
        return jax.device_put(params, rules.shardings(over_mesh.mesh, specs))

    return {name: place(name, params) for name, params in roles.items()}


def check_update(update, own_setup, shape, batch, *, pack=lambda params, axes: params, limit=1e-5):
    """Loss, metrics and gradients on the mesh and on one device.

    Gradients have the sharding of the adapter.
    """
    # 1. Both.
    (make, forward), over_mesh = UPDATES[update], sharded(*shape)
    roles = roles_on(over_mesh, pack)
    loss = make(own_setup, partial(forward, sharded=over_mesh), axes=AXES)
    (got, metrics), grads = loss_and_gradient(loss, roles, batch)
    alone = frozen_roles(lambda params: pack(params, ()))
    (want, want_metrics), want_grads = loss_and_gradient(make(own_setup), alone, batch)
    # 2. Compared.
    assert relative_error(got, want) < limit
    assert set(metrics) == set(want_metrics)
    for name, value in want_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=10 * limit, err_msg=name)
    errors = jax.tree.map(relative_error, grads, want_grads)
    assert max(jax.tree.leaves(errors)) < 10 * limit, errors
    for grad, param in zip(jax.tree.leaves(grads), jax.tree.leaves(roles[update]), strict=True):
        assert grad.sharding.is_equivalent_to(param.sharding, grad.ndim)


CASES = {
    # Windows of three chunks, a step in the middle, a shared teacher-free timestep per video.
    "windows": ((2, 2, 2), setup(dataclasses.replace(ROLLOUT, exit="uniform")), {"batch": 4}),
    # Scores after clean context, the reference's gradients, noised context, image to video.
    "clean": (
        (1, 1, 4),
        setup(
            dataclasses.replace(
                ROLLOUT, window=None, gradients="reference", context="noised", steps=3
            ),
            ScoreSpec(context="clean", per_chunk=True, shot_rope_offset=8),
            remat="everything",
        ),
        {"batch": 2, "image": True},
    ),
    # A device for every sample; the tail alone carries the gradient.
    "fsdp": (
        (1, 8, 1),
        setup(dataclasses.replace(ROLLOUT, tail=2, steps=1), ScoreSpec(guidance=1.0)),
        {"batch": 8, "image": True},
    ),
}


FAST = [("windows", "generator"), ("clean", "generator"), ("fsdp", "critic")]
SLOW = [(case, update) for case in CASES for update in UPDATES if (case, update) not in FAST]


@pytest.mark.parametrize(
    ("case", "update"), [*FAST, *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW)]
)
def test_loss_and_gradients_equal_one_device(case, update):
    shape, own_setup, batch = CASES[case]
    check_update(update, own_setup, shape, videos(**batch))


@pytest.mark.parametrize("update", ["critic", pytest.param("generator", marks=pytest.mark.slow)])
def test_packed_backbones_and_caches_equal_one_device(update):
    """The largest magnitudes of activations and of cached chunks are those of all devices."""
    own_setup = setup(dataclasses.replace(ROLLOUT, kv="nvfp4"))

    def pack(params, axes):
        return freeze(params, NEAREST, gradient=True, axes=axes)

    check_update(update, own_setup, (2, 1, 2), videos(2), pack=pack, limit=1e-3)


def test_specs_of_a_role_have_the_structure_of_its_parameters():
    """With keys of rounding and dropout, over arrays, NVFP4 and FP8."""
    lora, specs = LoRASpec(rank=4, dropout=0.1), sharded(2, 2, 2).specs
    for policy in (None, named("nvfp4_frozen"), named("fp8")):
        backbone = weights(1)
        if policy is not None:
            backbone = freeze(backbone, policy, gradient=True, axes=AXES)
        params = trained_params(backbone, adapter(1), lora, jax.random.key(0), AXES)
        own = role_specs(params, specs)
        assert jax.tree.structure(own) == jax.tree.structure(params)
        branch = own["blocks"]["ffn"]["up"]["kernel"].branch
        assert branch.a == jax.P(None, rules.SHARDS) and branch.dropout.axes == AXES


@pytest.mark.slow
def test_dropout_and_stochastic_rounding_run_over_a_mesh():
    lora = LoRASpec(rank=4, dropout=0.1)
    over_mesh = sharded(2, 2, 2)

    def pack(params):
        params = freeze(params, named("nvfp4_frozen"), gradient=True, axes=AXES)
        return fit_shards(params, over_mesh.specs, over_mesh.mesh.shape)

    loss = generator(setup(), partial(sharded_generator_loss, sharded=over_mesh), axes=AXES)
    loss = dataclasses.replace(loss, lora=lora)
    (value, _), grads = loss_and_gradient(loss, frozen_roles(pack), videos(4))
    assert np.isfinite(value)
    assert all(np.abs(np.asarray(x)).max() > 0 for x in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ((1, 1, 8), {}, "4 attention heads do not split over mesh.sp = 8; choose a divisor"),
        ((1, 1, 4), {"chunk_frames": 2}, "2 latent frames of a chunk do not split over mesh.sp"),
        ((1, 1, 4), {"rollout": RolloutSpec(chunks=6)}, "6 chunks of a sequence do not split over"),
        ((2, 2, 2), {}, "2 samples in a batch do not split over mesh.data * mesh.fsdp = 4"),
    ],
)
def test_what_does_not_divide_is_refused_before_compilation(shape, changes, message):
    own_setup = dataclasses.replace(setup(), **changes)
    loss = generator(own_setup, partial(sharded_generator_loss, sharded=sharded(*shape)))
    with pytest.raises(ValueError) as caught:
        loss_and_gradient(loss, frozen_roles(), videos(2))
    assert message in str(caught.value)
