"""Error recycling: which errors it injects and stores, and settings that are errors."""

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
from longlive_jax.training.objectives.batch import ARLossSpec
from longlive_jax.training.objectives.error_recycling import (
    Errors,
    RecyclingSpec,
    buffer_specs,
    check_recycling,
    init_buffers,
    prediction_errors,
    record_errors,
    recycle,
)
from longlive_jax.training.objectives.sharded import ShardedLoss, sharded_forward
from longlive_jax.training.objectives.teacher_forcing import (
    ARSetup,
    TeacherForcingLoss,
)
from pallas_kernels.tokens import EMPTY
from tests.longlive_jax.training.recycled import (
    BATCH_SIZE,
    CHUNK,
    CHUNKS,
    LOSS,
    SIZE,
    assert_all_close,
    compiled_with,
    example_batch,
    make_inputs,
    rollout,
    spec_of,
)
from tests.tiny import activate_outputs


def test_equal_draws_give_equal_results():
    first, again = (rollout(spec_of(), steps=4) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_injected_errors_come_from_the_buffers():
    """Each difference is an error of the right row and bucket, times a factor within bounds."""
    spec = dataclasses.replace(spec_of(slots=1), clean=0.0, noise=1.0, latent=1.0, context=1.0)
    batch, draws, recycling_draws = make_inputs(0)
    key = jax.random.key(1)
    buffers = jax.tree.map(
        lambda x: jax.random.normal(key, x.shape) if x.ndim > 3 else jnp.ones_like(x),
        init_buffers(spec, (CHUNK, *SIZE)),
    )
    used = compiled_with(recycle, spec)(recycling_draws, batch, draws, buffers)
    high = np.asarray(draws.timestep)[:, ::CHUNK] < np.float32(5000 / 6)  # of table entry 500
    injections = {
        "noise": (used.draws.noise - draws.noise, buffers.noise, (high, high)),
        "latent": (used.model_batch.target - batch.target, buffers.latent, (high, high)),
        "context": (used.draws.context - draws.context, buffers.latent, (0 * high, 0 * high + 1)),
    }
    for name, (added, buffer, columns) in injections.items():
        added = np.asarray(added).reshape(BATCH_SIZE, CHUNKS, -1)
        entries = np.asarray(buffer.entries[0, :, :, 0]).reshape(CHUNKS, 2, -1)
        for b, i in np.ndindex(BATCH_SIZE, CHUNKS):
            candidates = [entries[i, int(column[b, i])] for column in columns]
            factors = [added[b, i] @ x / (x @ x) for x in candidates]
            residuals = [
                np.abs(added[b, i] - f * x).max() for f, x in zip(factors, candidates, strict=True)
            ]
            best = int(np.argmin(residuals))
            assert residuals[best] < 1e-5 and 0.7 <= factors[best] <= 1.3, (name, b, i)


def test_clean_samples_and_steps_before_the_start_get_no_errors():
    batch, draws, recycling_draws = make_inputs(0)
    full = jax.tree.map(jnp.ones_like, init_buffers(spec_of(), (CHUNK, *SIZE)))
    run = compiled_with(recycle, dataclasses.replace(spec_of(), start=9))
    used = run(recycling_draws, batch, draws, full)
    assert_all_close((used.model_batch, used.draws), (batch, draws), 0)
    started = dataclasses.replace(full, num_updates=jnp.array(9))
    used = run(recycling_draws, batch, draws, started)
    change = jnp.abs(used.model_batch.target - batch.target).max((1, 2, 3, 4))
    assert used.clean.any() and change.any()
    assert not change[used.clean].any()


def test_errors_are_differences_of_predictions_from_targets():
    batch, draws, recycling_draws = make_inputs(0)
    spec = spec_of()
    buffers = init_buffers(spec, (CHUNK, *SIZE))
    used = compiled_with(recycle, spec)(recycling_draws, batch, draws, buffers)
    assert_all_close((used.model_batch, used.draws), (batch, draws))  # the buffers are still empty
    exact = draws.noise - batch.target
    assert_all_close(prediction_errors(exact, batch, used), Errors(*[jnp.zeros_like(exact)] * 2))
    errors = prediction_errors(exact + 1, batch, used)
    sigma = jnp.broadcast_to(draws.sigma[..., None, None, None], exact.shape)
    assert_all_close(errors, Errors(latent=-sigma, noise=1 - sigma), 1e-5)


def test_a_conditioning_image_is_unchanged_and_has_no_error():
    loss = ARLossSpec(image_to_video=True)
    used, buffers = rollout(spec_of(), loss=loss)
    batch, *_ = make_inputs(5)
    for got, want in ((used.model_batch.target, batch.target), (used.draws.context, batch.context)):
        np.testing.assert_array_equal(got[:, 0], want[:, 0])
        assert jnp.abs(got - want)[:, 1].max() > 0.1
    assert not buffers.latent.entries[:, 0, :, :, 0].any()
    assert buffers.latent.entries[:, 0, :, :, 1].any()


def test_errors_that_are_not_stored():
    """Non-finite ones, and those of padded chunks, clean samples and non-finite losses."""
    spec = dataclasses.replace(spec_of(rows=1, buckets=1, slots=99), clean=0.0, update=0.0)
    batch, draws, recycling_draws = make_inputs(0)
    buffers = init_buffers(spec, (CHUNK, *SIZE))
    used = compiled_with(recycle, spec)(recycling_draws, batch, draws, buffers)
    run = compiled_with(record_errors, spec)

    def count(errors, batch=batch, used=used, **more):
        updated = run(recycling_draws, Errors(errors, errors), batch, used, buffers, **more)
        return int(updated.latent.added.sum())

    ones, total = jnp.ones_like(batch.target), BATCH_SIZE * CHUNKS
    assert count(ones) == total
    assert count(ones.at[1, 5, 0, 0, 0].set(jnp.nan)) == total - 1
    padded = dataclasses.replace(batch, mask=batch.mask.at[2, -3:].set(0.0))
    assert count(ones, padded) == total - 2
    half_clean = dataclasses.replace(used, clean=jnp.array([True, False, False, True]))
    assert count(ones, used=half_clean) == total // 2
    assert count(ones, is_finite=jnp.array(False)) == 0


def test_groups_exchange_errors_only_during_warmup():
    spec = spec_of(groups=2)  # warmup ends with step 2
    _, warm = rollout(spec, steps=3)
    np.testing.assert_array_equal(*(x for x in warm.latent.entries))
    _, later = rollout(spec, steps=5)
    assert jnp.abs(later.latent.entries[0] - later.latent.entries[1]).max() > 0.1
    added = later.latent.added.sum((1, 2)) - warm.latent.added.sum((1, 2))
    assert (added <= 2 * BATCH_SIZE * CHUNKS // 2).all()


def test_rows_by_chunk_are_chunk_indices():
    """A row serves one chunk index, anywhere in a window; the last row serves all later ones."""
    spec = dataclasses.replace(spec_of(by="chunk", rows=5), clean=0.0)
    batch, draws, recycling_draws = make_inputs(0)
    numbers = jnp.array([[EMPTY, 0, *range(3, 9), 0, 4, *range(3, 9)]] * BATCH_SIZE)
    batch = dataclasses.replace(batch, chunk_index=numbers)
    buffers = init_buffers(spec, (CHUNK, *SIZE))
    used = compiled_with(recycle, spec)(recycling_draws, batch, draws, buffers)
    errors = Errors(batch.target, batch.target)
    updated = compiled_with(record_errors, spec)(recycling_draws, errors, batch, used, buffers)
    np.testing.assert_array_equal(updated.latent.added.sum((0, 2)), [4, 0, 0, 4, 24])


DIT = DiTConfig(
    dim=24, ffn_dim=32, freq_dim=8, text_dim=4, text_len=2, heads=2, layers=1,
    in_channels=SIZE[2], out_channels=SIZE[2],
)  # fmt: skip


def test_teacher_forcing_loss_with_recycling():
    """With empty buffers it is the plain loss; it is reproducible, and the same over a mesh."""
    graphdef, _ = abstract(lambda: DiT(DIT, rngs=nnx.Rngs(0)))
    setup = ARSetup(graphdef, chunk_frames=CHUNK, empty_prompt=1, spec=LOSS)
    spec = dataclasses.replace(spec_of(), clean=0.0, latent=1.0)
    text = jax.random.normal(jax.random.key(2), (2, DIT.text_len, DIT.text_dim))
    batch, key = example_batch(jax.random.key(4)), jax.random.key(5)

    def init(key):
        return activate_outputs(params_of(DiT(DIT, rngs=nnx.Rngs(key))))

    def inputs(batch):
        return batch, text

    # 1. Empty buffers.
    params = jax.jit(init)(jax.random.key(1))
    recycling_loss = TeacherForcingLoss(setup, inputs, recycling=spec)
    want, _ = jax.jit(recycling_loss.without_recycling())(params, batch, key)
    single = jax.jit(recycling_loss)
    start = init_buffers(spec, (CHUNK, *SIZE))
    loss, (metrics, once) = single(params, batch, key, start)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert metrics["stored_errors"] == once.latent.counts.sum() > BATCH_SIZE * CHUNKS / 2
    # 2. With stored errors, twice.
    recycled, (_, twice) = single(params, batch, key, once)
    assert abs(recycled - want) > 1e-3 and int(twice.num_updates) == 2
    again, (_, replayed) = single(params, batch, key, once)
    assert again == recycled
    assert_all_close(replayed, twice, 0)

    # 3. Over a mesh.
    mesh = make_mesh(MeshSpec(data=2, sp=2), jax.devices()[:4])
    param_shards, specs = init_sharded(init, jax.random.key(1), mesh, DIT_RULES)
    forward = functools.partial(sharded_forward, sharded=ShardedLoss(mesh, specs))
    sharded = jax.jit(dataclasses.replace(recycling_loss, forward=forward))
    buffers = jax.device_put(once, shardings(mesh, buffer_specs(spec)))
    loss, (_, updated) = sharded(param_shards, batch, key, buffers)
    np.testing.assert_allclose(loss, recycled, rtol=1e-5)
    assert_all_close(updated, twice, 1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clean": 1.5}, "clean must be from 0 to 1, got 1.5"),
        ({"buffer": {"slots": 0}}, "slots must be >= 1, got 0"),
        ({"buffer": {"replace": "newest"}}, "'newest' is not one of"),
    ],
)
def test_invalid_settings_are_errors(settings, message):
    with pytest.raises(UserError, match=message):
        build(RecyclingSpec, settings, path="recycling")


def test_sizes_that_do_not_divide_are_errors():
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
        ({"groups": 4}, (8, 8), None),  # as from a run on a smaller mesh
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
