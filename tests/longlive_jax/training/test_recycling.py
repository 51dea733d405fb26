"""Error recycling: what it mixes in, what it keeps, and that no result depends on the mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.models.params import abstract, params_of
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.parallel.mesh import BATCH, SP, MeshSpec, make_mesh
from longlive_jax.parallel.rules import DIT as DIT_RULES
from longlive_jax.parallel.rules import init_sharded, shardings
from longlive_jax.spec import UserError, build
from longlive_jax.training.ar import ARLossSpec, ARSetup, Episode, ar_loss, draw, forward
from longlive_jax.training.error_buffer import BufferSpec
from longlive_jax.training.recycling import (
    Errors,
    RecyclingSpec,
    bytes_held,
    check_recycling,
    init_buffers,
    observe,
    partition,
    prediction_errors,
    recycle,
    recycling_loss,
    roll,
)
from longlive_jax.training.sharded import Shared, shared_forward
from pallas_kernels.tokens import EMPTY
from tests.tiny import lively

CHUNK, CHUNKS, BATCH_SIZE, SIZE = 2, 8, 4, (2, 2, 3)
LOSS = ARLossSpec()


def spec_of(**buffer) -> RecyclingSpec:
    """Everything happens often."""
    layout = {"rows": CHUNKS, "buckets": 2, "slots": 2, "dtype": "float32"} | buffer
    return RecyclingSpec(
        BufferSpec(**layout), clean=0.3, noise=0.6, latent=0.8, context=0.9, update=0.5, warmup=2
    )


def episode(key) -> Episode:
    clean = jax.random.normal(key, (BATCH_SIZE, CHUNKS * CHUNK, *SIZE))
    chunk = jnp.tile(jnp.arange(CHUNKS), (BATCH_SIZE, 2))
    zeros = jnp.zeros_like(chunk)
    return Episode(
        context=clean, target=clean, mask=jnp.ones(clean.shape[:2]), chunk=chunk,
        start=chunk * CHUNK, since=zeros, sink=zeros + EMPTY, prompt=zeros,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=1)
def given(step, loss=LOSS):
    """Batch, draws and rolls of a step."""
    key = jax.random.fold_in(jax.random.key(5), step)
    batch = episode(key)
    rolls = roll(jax.random.fold_in(key, 1), BATCH_SIZE, CHUNKS, CHUNKS)
    return batch, draw(key, batch, chunk=CHUNK, spec=loss), rolls


def of(function, spec, loss=LOSS):
    """`recycle` or `observe`, compiled."""
    return jax.jit(functools.partial(function, chunk=CHUNK, spec=spec, loss=loss))


def one_step(spec, loss, buffers, batch, draws, rolls):
    """A step around a model that answers with a mix of what it sees."""
    options = {"chunk": CHUNK, "spec": spec, "loss": loss}
    used = recycle(rolls, batch, draws, buffers, **options)
    velocity = 0.3 * used.batch.target + 0.2 * used.draws.noise - 0.1 * used.draws.context
    errors = prediction_errors(velocity, batch, used)
    return used, observe(rolls, errors, batch, used, buffers, **options)


def rollout(spec, mesh=None, steps=6, loss=LOSS):
    """The last step's mixed-in batch and the buffers after it."""
    buffers = init_buffers(spec, (CHUNK, *SIZE), mesh)
    held = None if mesh is None else (None, shardings(mesh, partition(spec)))
    run = jax.jit(functools.partial(one_step, spec, loss), donate_argnums=0, out_shardings=held)
    for step in range(steps):
        inputs = given(step, loss)
        if mesh is not None:
            inputs = jax.device_put(inputs, jax.tree.map(functools.partial(place, mesh), inputs))
        used, buffers = run(buffers, *inputs)
    return used, buffers


def place(mesh, x):
    """Where an input is in training: samples by data, frames by sp."""
    frames = x.ndim > 1 and x.shape[1] == CHUNKS * CHUNK
    return NamedSharding(mesh, P(BATCH, SP) if frames else P(BATCH))


def alike(got, want, tolerance=1e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)


LAYOUTS = {
    "by column": {},
    "own groups": {"groups": 2},
    "by chunk": {"by": "chunk", "rows": 5},
    "dealt": {"rows": 4, "buckets": 6, "dealt": True, "replace": "oldest"},
    "alike": {"rows": 1, "replace": "nearest"},
}


@functools.cache
def alone(name):
    return rollout(spec_of(**LAYOUTS[name]))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("by column", (2, 1, 4)),
        ("by column", (1, 4, 2)),
        ("own groups", (2, 1, 4)),
        ("by chunk", (2, 1, 2)),
        ("dealt", (2, 1, 4)),
        ("alike", (2, 2, 1)),
    ],
    ids=str,
)
def test_no_result_depends_on_the_mesh(name, shape):
    spec, sizes = spec_of(**LAYOUTS[name]), MeshSpec(*shape)
    mesh = make_mesh(sizes, jax.devices()[: sizes.size])
    used, buffers = rollout(spec, mesh)
    alike((used, buffers), alone(name))
    place = NamedSharding(mesh, partition(spec).latent.entries)
    for leaf in jax.tree.leaves((buffers.latent, buffers.noise)):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def compiled(spec, sizes: MeshSpec):
    """The program of a step."""
    mesh = make_mesh(sizes, jax.devices()[: sizes.size])
    held = shardings(mesh, partition(spec))

    def shape(x, where):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    buffers = jax.eval_shape(lambda: init_buffers(spec, (CHUNK, *SIZE)))
    inputs = jax.tree.map(lambda x: shape(x, place(mesh, x)), given(0))
    run = jax.jit(
        functools.partial(one_step, spec, LOSS), donate_argnums=0, out_shardings=(None, held)
    )
    return run.lower(jax.tree.map(shape, buffers, held), *inputs).compile()


def test_positions_by_column_move_nothing_between_sp_ranks():
    program = compiled(spec_of(), MeshSpec(sp=4)).as_text()
    moved = re.findall(
        r"(\S+) = \S+ (all-gather|all-reduce|all-to-all|collective-permute)\(", program
    )
    assert not moved


@pytest.mark.parametrize("groups", [1, 2])
def test_buffers_are_updated_in_place(groups):
    """All of a large buffer is there once, as argument and result."""
    spec = spec_of(slots=400, groups=groups)
    memory = compiled(spec, MeshSpec(data=2, sp=2)).memory_analysis()
    held = bytes_held(spec, (CHUNK, *SIZE), {"data": 2, "fsdp": 1, "sp": 2})
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 4


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
    alike((used.batch, used.draws), (batch, draws), 0)
    used = mixed(rolls, batch, draws, dataclasses.replace(full, seen=jnp.array(9)))
    moved = jnp.abs(used.batch.target - batch.target).max((1, 2, 3, 4))
    assert used.clean.any() and moved.any()
    assert not moved[used.clean].any()


def test_errors_are_how_far_the_prediction_is_off():
    batch, draws, rolls = given(0)
    spec = spec_of()
    buffers = init_buffers(spec, (CHUNK, *SIZE))
    used = of(recycle, spec)(rolls, batch, draws, buffers)
    alike((used.batch, used.draws), (batch, draws))  # nothing is held yet
    right = draws.noise - batch.target
    alike(prediction_errors(right, batch, used), Errors(*[jnp.zeros_like(right)] * 2))
    off = prediction_errors(right + 1, batch, used)
    sigma = jnp.broadcast_to(draws.sigma[..., None, None, None], right.shape)
    alike(off, Errors(latent=-sigma, noise=1 - sigma), 1e-5)


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
    batch = dataclasses.replace(batch, chunk=numbers)
    buffers = init_buffers(spec, (CHUNK, *SIZE))
    used = of(recycle, spec)(rolls, batch, draws, buffers)
    errors = Errors(batch.target, batch.target)
    found = of(observe, spec)(rolls, errors, batch, used, buffers)
    np.testing.assert_array_equal(found.latent.added.sum((0, 2)), [4, 0, 0, 4, 24])


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 1, 1), (2, 2, 2)], ids=str)
def test_a_checkpoint_fits_any_mesh(tmp_path, shape):
    spec = spec_of()
    start = make_mesh(MeshSpec(data=2, sp=4), jax.devices())
    _, buffers = rollout(spec, start)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "buffers", buffers)
        saver.wait_until_finished()
        sizes = MeshSpec(*shape)
        mesh = make_mesh(sizes, jax.devices()[: sizes.size])
        like = init_buffers(spec, (CHUNK, *SIZE), mesh)
        restored = saver.restore(
            tmp_path / "buffers", jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        )
    for got, want, held in zip(*map(jax.tree.leaves, (restored, buffers, like)), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.sharding.is_equivalent_to(held.sharding, got.ndim)


DIT = DiTConfig(
    dim=24, ffn_dim=32, freq_dim=8, text_dim=4, text_len=2, heads=2, layers=1,
    in_channels=SIZE[2], out_channels=SIZE[2],
)  # fmt: skip


def test_a_loss_that_recycles():
    """While nothing is held it is the plain loss; a replay from the same buffers is the same; and
    over a mesh it is what it is on one device."""
    graphdef, _ = abstract(lambda: DiT(DIT, rngs=nnx.Rngs(0)))
    setup = ARSetup(graphdef, chunk=CHUNK, empty_prompt=1, spec=LOSS)
    spec = dataclasses.replace(spec_of(), clean=0.0, latent=1.0)
    text = jax.random.normal(jax.random.key(2), (2, DIT.text_len, DIT.text_dim))
    batch, key = episode(jax.random.key(4)), jax.random.key(5)

    def init(key):
        return lively(params_of(DiT(DIT, rngs=nnx.Rngs(key))))

    def step(run):
        def judged(params, batch, used):
            return run(params, batch, used.batch, used.draws, text)

        return jax.jit(recycling_loss(judged, chunk=CHUNK, spec=spec, loss=LOSS))

    params = jax.jit(init)(jax.random.key(1))
    want, _ = jax.jit(functools.partial(ar_loss, setup))(params, batch, key, text)
    alone = step(functools.partial(forward, setup))
    start = init_buffers(spec, (CHUNK, *SIZE))
    loss, (metrics, once) = alone(params, batch, key, start)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert metrics["errors_held"] == once.latent.held.sum() > BATCH_SIZE * CHUNKS / 2
    mixed, (_, twice) = alone(params, batch, key, once)
    assert abs(mixed - want) > 1e-3 and int(twice.seen) == 2
    again, (_, replayed) = alone(params, batch, key, once)
    assert again == mixed
    alike(replayed, twice, 0)

    mesh = make_mesh(MeshSpec(data=2, sp=2), jax.devices()[:4])
    held, specs = init_sharded(init, jax.random.key(1), mesh, DIT_RULES)
    over = step(functools.partial(shared_forward, setup, Shared(mesh, specs)))
    buffers = jax.device_put(once, shardings(mesh, partition(spec)))
    shared, (_, after) = over(held, batch, key, buffers)
    np.testing.assert_allclose(shared, mixed, rtol=1e-5)
    alike(after, twice, 1e-4)


def test_groups_outlive_a_larger_mesh():
    """Two groups over four data-parallel ranks lie whole on each, and a save of theirs fits."""
    spec, mesh = spec_of(groups=2), make_mesh(MeshSpec(data=4, sp=2), jax.devices())
    buffers = init_buffers(spec, (CHUNK, *SIZE), mesh)
    assert jax.tree.map(jnp.shape, buffers) == jax.tree.map(
        jnp.shape,
        init_buffers(spec, (CHUNK, *SIZE), make_mesh(MeshSpec(data=2, sp=4), jax.devices())),
    )
    held = buffers.latent.entries
    assert held.sharding.shard_shape(held.shape)[0] == 2
    whole = bytes_held(spec, (CHUNK, *SIZE))
    assert bytes_held(spec, (CHUNK, *SIZE), mesh.shape) == whole // 2  # rows over sp alone


def test_memory_is_what_is_said():
    spec = spec_of(groups=2)
    mesh = make_mesh(MeshSpec(data=2, sp=4), jax.devices())
    buffers = init_buffers(spec, (CHUNK, *SIZE), mesh)
    leaves = jax.tree.leaves((buffers.latent, buffers.noise))
    assert bytes_held(spec, (CHUNK, *SIZE)) == sum(x.nbytes for x in leaves)
    on_one = sum(x.addressable_shards[0].data.nbytes for x in leaves)
    assert bytes_held(spec, (CHUNK, *SIZE), mesh.shape) == on_one
    # what the docstring of BufferSpec says of the 5B model
    videos = RecyclingSpec(BufferSpec(rows=48))
    gib = [bytes_held(videos, (8, 44, 80, 48), m) / 2**30 for m in (None, {"sp": 4})]
    np.testing.assert_allclose(gib, [9.7, 2.4], atol=0.05)


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
