"""Error recycling: what it mixes in, what it keeps, and what is refused."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.models.params import abstract, params_of
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.parallel.rules import DIT as DIT_RULES
from longlive_jax.parallel.rules import init_sharded, shardings
from longlive_jax.spec import UserError, build
from longlive_jax.training.objectives.batch import (
    ARLossSpec,
)
from longlive_jax.training.objectives.error_recycling import (
    Errors,
    RecyclingSpec,
    check_recycling,
    init_buffers,
    observe,
    partition,
    prediction_errors,
    recycle,
    recycling_loss,
)
from longlive_jax.training.objectives.sharded import ShardedLoss, sharded_forward
from longlive_jax.training.objectives.teacher_forcing import (
    ARSetup,
    forward,
    teacher_forcing_loss,
)
from pallas_kernels.tokens import EMPTY
from tests.longlive_jax.training.recycled import (
    BATCH_SIZE,
    CHUNK,
    CHUNKS,
    LOSS,
    SIZE,
    episode,
    given,
    of,
    rollout,
    spec_of,
    uniform_mask,
)
from tests.tiny import activate_outputs


def test_nothing_is_random_but_the_rolls():
    first, again = (rollout(spec_of(), steps=4) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_injections_are_what_the_buffers_hold():
    """Each difference is an error of the right row and bucket, times a factor in bounds."""
    spec = dataclasses.replace(spec_of(slots=1), clean=0.0, noise=1.0, latent=1.0, context=1.0)
    batch, draws, rolls = given(0)
    key = jax.random.key(1)
    buffers = jax.tree.map(
        lambda x: jax.random.normal(key, x.shape) if x.ndim > 3 else jnp.ones_like(x),
        init_buffers(spec, (CHUNK, *SIZE)),
    )
    used = of(recycle, spec)(rolls, batch, draws, buffers)
    high = np.asarray(draws.timestep)[:, ::CHUNK] < np.float32(5000 / 6)  # of entry 500
    found = {
        "noise": (used.draws.noise - draws.noise, buffers.noise, (high, high)),
        "latent": (used.batch.target - batch.target, buffers.latent, (high, high)),
        "context": (used.draws.context - draws.context, buffers.latent, (0 * high, 0 * high + 1)),
    }
    for name, (added, buffer, columns) in found.items():
        added = np.asarray(added).reshape(BATCH_SIZE, CHUNKS, -1)
        held = np.asarray(buffer.entries[0, :, :, 0]).reshape(CHUNKS, 2, -1)
        for b, i in np.ndindex(BATCH_SIZE, CHUNKS):
            options = [held[i, int(column[b, i])] for column in columns]
            factors = [added[b, i] @ x / (x @ x) for x in options]
            off = [np.abs(added[b, i] - f * x).max() for f, x in zip(factors, options, strict=True)]
            best = int(np.argmin(off))
            assert off[best] < 1e-5 and 0.7 <= factors[best] <= 1.3, (name, b, i)


def test_nothing_is_mixed_in_before_the_start_nor_into_clean_samples():
    batch, draws, rolls = given(0)
    full = jax.tree.map(jnp.ones_like, init_buffers(spec_of(), (CHUNK, *SIZE)))
    mixed = of(recycle, dataclasses.replace(spec_of(), start=9))
    used = mixed(rolls, batch, draws, full)
    uniform_mask((used.batch, used.draws), (batch, draws), 0)
    used = mixed(rolls, batch, draws, dataclasses.replace(full, seen=jnp.array(9)))
    moved = jnp.abs(used.batch.target - batch.target).max((1, 2, 3, 4))
    assert used.clean.any() and moved.any()
    assert not moved[used.clean].any()


def test_errors_are_how_far_the_prediction_is_off():
    batch, draws, rolls = given(0)
    spec = spec_of()
    buffers = init_buffers(spec, (CHUNK, *SIZE))
    used = of(recycle, spec)(rolls, batch, draws, buffers)
    uniform_mask((used.batch, used.draws), (batch, draws))  # nothing is held yet
    right = draws.noise - batch.target
    uniform_mask(prediction_errors(right, batch, used), Errors(*[jnp.zeros_like(right)] * 2))
    off = prediction_errors(right + 1, batch, used)
    sigma = jnp.broadcast_to(draws.sigma[..., None, None, None], right.shape)
    uniform_mask(off, Errors(latent=-sigma, noise=1 - sigma), 1e-5)


def test_a_given_image_stays_and_has_no_error():
    loss = ARLossSpec(image_to_video=True)
    used, buffers = rollout(spec_of(), loss=loss)
    batch, *_ = given(5)
    for got, want in ((used.batch.target, batch.target), (used.draws.context, batch.context)):
        np.testing.assert_array_equal(got[:, 0], want[:, 0])
        assert jnp.abs(got - want)[:, 1].max() > 0.1
    assert not buffers.latent.entries[:, 0, :, :, 0].any()
    assert buffers.latent.entries[:, 0, :, :, 1].any()


def test_what_is_not_kept():
    """Padded chunks, errors that are not finite, clean samples, steps without an update."""
    spec = dataclasses.replace(spec_of(rows=1, buckets=1, slots=99), clean=0.0, update=0.0)
    batch, draws, rolls = given(0)
    buffers = init_buffers(spec, (CHUNK, *SIZE))
    used = of(recycle, spec)(rolls, batch, draws, buffers)
    keeping = of(observe, spec)

    def count(errors, batch=batch, used=used, **more):
        found = keeping(rolls, Errors(errors, errors), batch, used, buffers, **more)
        return int(found.latent.added.sum())

    fine, every = jnp.ones_like(batch.target), BATCH_SIZE * CHUNKS
    assert count(fine) == every
    assert count(fine.at[1, 5, 0, 0, 0].set(jnp.nan)) == every - 1
    padded = dataclasses.replace(batch, mask=batch.mask.at[2, -3:].set(0.0))
    assert count(fine, padded) == every - 2
    some = dataclasses.replace(used, clean=jnp.array([True, False, False, True]))
    assert count(fine, used=some) == every // 2
    assert count(fine, good=jnp.array(False)) == 0


def test_groups_share_their_errors_while_warming_up_only():
    spec = spec_of(groups=2)  # warm until step 2
    _, shared = rollout(spec, steps=3)
    np.testing.assert_array_equal(*(x for x in shared.latent.entries))
    _, apart = rollout(spec, steps=5)
    assert jnp.abs(apart.latent.entries[0] - apart.latent.entries[1]).max() > 0.1
    added = apart.latent.added.sum((1, 2)) - shared.latent.added.sum((1, 2))
    assert (added <= 2 * BATCH_SIZE * CHUNKS // 2).all()


def test_positions_of_windows_are_chunk_numbers():
    """A row serves one number, wherever in an episode it stands; the last all later ones."""
    spec = dataclasses.replace(spec_of(by="chunk", rows=5), clean=0.0)
    batch, draws, rolls = given(0)
    numbers = jnp.array([[EMPTY, 0, *range(3, 9), 0, 4, *range(3, 9)]] * BATCH_SIZE)
    batch = dataclasses.replace(batch, chunk_index=numbers)
    buffers = init_buffers(spec, (CHUNK, *SIZE))
    used = of(recycle, spec)(rolls, batch, draws, buffers)
    errors = Errors(batch.target, batch.target)
    found = of(observe, spec)(rolls, errors, batch, used, buffers)
    np.testing.assert_array_equal(found.latent.added.sum((0, 2)), [4, 0, 0, 4, 24])


DIT = DiTConfig(
    dim=24, ffn_dim=32, freq_dim=8, text_dim=4, text_len=2, heads=2, layers=1,
    in_channels=SIZE[2], out_channels=SIZE[2],
)  # fmt: skip


def test_a_loss_that_recycles():
    """While nothing is held it is the plain loss; a replay from the same buffers is the same; and
    over a mesh it is what it is on one device."""
    graphdef, _ = abstract(lambda: DiT(DIT, rngs=nnx.Rngs(0)))
    setup = ARSetup(graphdef, chunk_frames=CHUNK, empty_prompt=1, spec=LOSS)
    spec = dataclasses.replace(spec_of(), clean=0.0, latent=1.0)
    text = jax.random.normal(jax.random.key(2), (2, DIT.text_len, DIT.text_dim))
    batch, key = episode(jax.random.key(4)), jax.random.key(5)

    def init(key):
        return activate_outputs(params_of(DiT(DIT, rngs=nnx.Rngs(key))))

    def step(run):
        def judged(params, batch, used):
            return run(params, batch, used.batch, used.draws, text)

        return jax.jit(recycling_loss(judged, chunk_frames=CHUNK, spec=spec, loss=LOSS))

    params = jax.jit(init)(jax.random.key(1))
    want, _ = jax.jit(functools.partial(teacher_forcing_loss, setup))(params, batch, key, text)
    alone = step(functools.partial(forward, setup))
    start = init_buffers(spec, (CHUNK, *SIZE))
    loss, (metrics, once) = alone(params, batch, key, start)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert metrics["errors_held"] == once.latent.held.sum() > BATCH_SIZE * CHUNKS / 2
    mixed, (_, twice) = alone(params, batch, key, once)
    assert abs(mixed - want) > 1e-3 and int(twice.seen) == 2
    again, (_, replayed) = alone(params, batch, key, once)
    assert again == mixed
    uniform_mask(replayed, twice, 0)

    mesh = make_mesh(MeshSpec(data=2, sp=2), jax.devices()[:4])
    held, specs = init_sharded(init, jax.random.key(1), mesh, DIT_RULES)
    over = step(functools.partial(sharded_forward, setup, ShardedLoss(mesh, specs)))
    buffers = jax.device_put(once, shardings(mesh, partition(spec)))
    shared, (_, after) = over(held, batch, key, buffers)
    np.testing.assert_allclose(shared, mixed, rtol=1e-5)
    uniform_mask(after, twice, 1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clean": 1.5}, "clean is 1.5; give a share, 0 to 1"),
        ({"buffer": {"slots": 0}}, "slots is 0"),
        ({"buffer": {"replace": "newest"}}, "'newest' is not one of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        build(RecyclingSpec, settings, path="recycling")


def test_what_does_not_split_is_refused():
    mesh = make_mesh(MeshSpec(data=2, sp=4), jax.devices())
    with pytest.raises(ValueError, match="an axis of 6 does not split into 4"):
        init_buffers(spec_of(rows=6), (CHUNK, *SIZE), mesh)
    with pytest.raises(ValueError, match=r"8 chunks of a sequence do not fill .* 3 rows evenly"):
        rollout(spec_of(rows=3), steps=1)
    with pytest.raises(ValueError, match=r"4 samples do not split into .*groups = 3"):
        rollout(spec_of(groups=3), steps=1)


@pytest.mark.parametrize(
    ("layout", "chunks", "message"),
    [
        ({}, (8, 4), "4 chunks of a sequence do not fill the error buffer's 8 rows"),
        ({"groups": 3}, (8, 8), "8 samples do not split into recycling.buffer.groups = 3"),
        ({"rows": 6}, (6, 6), "rows = 6 does not split over mesh.sp = 4; choose a multiple of 4"),
        ({"groups": 1}, (8, 8), None),
        ({"groups": 4}, (8, 8), None),  # on a smaller mesh they were split
        ({"rows": 5, "by": "chunk"}, (9, 7), None),
    ],
)
def test_a_run_is_checked_before_it_starts(layout, chunks, message):
    mesh = MeshSpec(data=4, fsdp=2, sp=4)
    check = functools.partial(check_recycling, spec_of(**layout), mesh, chunks=chunks, batch=8)
    if message is None:
        return check()
    with pytest.raises(ValueError, match=re.escape(message)):
        check()
