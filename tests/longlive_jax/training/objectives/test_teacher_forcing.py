"""The teacher-forcing loss: receptive field of a target, masks, draws and conditioning frames."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.diffusion.flow import FlowSchedule
from longlive_jax.models.params import abstract, params_of, with_params
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.training.objectives.batch import (
    ARLossSpec,
    TeacherForcingBatch,
    draw,
)
from longlive_jax.training.objectives.teacher_forcing import (
    ARSetup,
    flow_loss,
    predict,
    teacher_forcing_loss,
)
from pallas_kernels.attention.chunks import attend_chunks
from pallas_kernels.tokens import EMPTY

CFG = DiTConfig(
    dim=32, ffn_dim=48, freq_dim=8, text_dim=8, text_len=4, heads=2, layers=2,
    in_channels=3, out_channels=3,
)  # fmt: skip
FRAMES, PROMPTS, WINDOW = 2, 6, 4  # frames per chunk; the last prompt is the empty one
# Columns of the two samples: context chunks, target chunks, then both for window and shot sink.
CONTEXT = [[0, 2, EMPTY, 3, 4], [0, EMPTY, 1, 2, 3]]
TARGET = [[0, 4, 5], [0, 3, 4]]
WINDOW_START = [[0, 0, 0, 2, 3, 0, 3, 4], [0, 0, 0, 0, 1, 0, 1, 2]]
SINK = [[EMPTY, 0, EMPTY, 0, 2, EMPTY, 2, 2], [EMPTY, EMPTY, 0, 0, 0, EMPTY, 0, 0]]
TWO_CHUNKS = 2 * FRAMES


@pytest.fixture(scope="module")
def model():
    """Graph definition and parameters; noise on all of them, so that no path has zero weights."""
    graphdef, _ = abstract(lambda: DiT(CFG, rngs=nnx.Rngs(0)))

    @jax.jit
    def params(key):
        leaves, tree = jax.tree.flatten(params_of(DiT(CFG, rngs=nnx.Rngs(key))))
        noise = [
            jax.random.normal(jax.random.fold_in(key, i), x.shape) for i, x in enumerate(leaves)
        ]
        return jax.tree.unflatten(tree, [x + 0.1 * y for x, y in zip(leaves, noise, strict=True)])

    return graphdef, params(jax.random.key(1))


@pytest.fixture(scope="module")
def text():
    return jax.random.normal(jax.random.key(2), (PROMPTS, CFG.text_len, CFG.text_dim))


@pytest.fixture(scope="module")
def batch():
    chunk = np.concatenate([CONTEXT, TARGET], axis=1)
    keys = jax.random.split(jax.random.key(3), 2)
    context, target = (
        jax.random.normal(key, (2, FRAMES * len(rows[0]), 4, 4, 3))
        for key, rows in zip(keys, (CONTEXT, TARGET), strict=True)
    )
    columns = {
        "chunk_index": chunk,
        "start": FRAMES * np.maximum(chunk, 0),
        "window_start": np.array(WINDOW_START),
        "sink": np.array(SINK),
        "prompt": np.maximum(chunk, 0) % 2,
    }
    columns = {name: jnp.asarray(column, jnp.int32) for name, column in columns.items()}
    return TeacherForcingBatch(context, target, jnp.ones(target.shape[:2]), **columns)


@pytest.fixture(scope="module")
def loss(model, text):
    """The loss as a function of parameters and batch, with fields of `ARSetup` as keywords."""
    graphdef, _ = model

    def loss(params, batch, *, text_dropout=0.0, **settings):
        spec = ARLossSpec(global_sinks=1, text_dropout=text_dropout)
        setup = ARSetup(graphdef, FRAMES, PROMPTS - 1, spec, **settings)
        return teacher_forcing_loss(setup, params, batch, jax.random.key(4), text)[0]

    return loss


def loss_on(batch, chunk):
    """The batch with the loss restricted to one target chunk."""
    in_chunk = jnp.arange(batch.mask.shape[1]) // FRAMES == chunk
    return batch.replace(mask=batch.mask * in_chunk)


def nonzero_chunks(gradient):
    """For every sample and chunk: whether the gradient is non-zero anywhere in it."""
    size = jnp.abs(gradient).reshape(len(gradient), -1, FRAMES * 48).max(-1)
    return np.asarray(size > 0).tolist()


def test_a_target_depends_only_on_itself_and_its_window(model, loss, batch):
    _, params = model

    def loss_of_latents(latents, batch):
        return loss(params, batch.replace(context=latents[0], target=latents[1]))

    gradient = jax.jit(jax.grad(loss_of_latents))
    latents = (batch.context, batch.target)

    # 1. A later target: neither its own clean copy nor the empty chunk is visible to it.
    context, target = gradient(latents, loss_on(batch, 1))
    assert nonzero_chunks(context) == [
        [True, True, False, True, False],
        [True, False, True, True, False],
    ]
    assert nonzero_chunks(target) == [[False, True, False]] * 2

    # 2. The first chunk has no context.
    context, target = gradient(latents, loss_on(batch, 0))
    assert nonzero_chunks(context) == [[False] * 5] * 2
    assert nonzero_chunks(target) == [[True, False, False]] * 2

    # 3. Loss on two chunks: the third target is invisible to them.
    _, target = gradient(latents, batch.replace(mask=batch.mask.at[:, TWO_CHUNKS:].set(0)))
    assert nonzero_chunks(target) == [[True, True, False]] * 2


def test_masked_frames_are_excluded_from_loss_and_metrics(batch):
    draws = draw(jax.random.key(4), batch, chunk_frames=FRAMES, spec=ARLossSpec())
    masked = batch.replace(mask=batch.mask.at[0, 1].set(0).at[1, TWO_CHUNKS:].set(0))
    velocity = jax.random.normal(jax.random.key(5), batch.target.shape)
    gradient, metrics = jax.grad(flow_loss, has_aux=True)(velocity, masked, draws)
    has_gradient = np.asarray(jnp.abs(gradient).max((2, 3, 4)) > 0)
    np.testing.assert_array_equal(has_gradient, np.asarray(masked.mask, bool))
    error = (velocity - (draws.noise - batch.target)) ** 2
    error = np.asarray(error.mean((2, 3, 4)))[np.asarray(masked.mask, bool)]
    assert float(metrics["velocity_error"]) == pytest.approx(error.mean(), rel=1e-5)


def test_attention_by_chunks_gives_the_same_loss_and_gradient(model, loss, batch):
    _, params = model
    by_chunks = functools.partial(attend_chunks, size=FRAMES * 4, most=WINDOW)
    fn = jax.jit(jax.value_and_grad(loss), static_argnames="attention_for")
    got = fn(params, batch, attention_for=lambda _: by_chunks)
    chex.assert_trees_all_close(got, fn(params, batch), rtol=1e-4, atol=1e-6)


def test_samples_do_not_influence_each_other(model, text, batch):
    graphdef, params = model
    draws = draw(jax.random.key(4), batch, chunk_frames=FRAMES, spec=ARLossSpec())

    @jax.jit
    def velocity(batch, draws):
        setup = ARSetup(graphdef, FRAMES, PROMPTS - 1, ARLossSpec(global_sinks=1))
        return predict(setup, with_params(graphdef, params), batch, draws, text)

    together = velocity(batch, draws)
    for i in range(2):
        alone = velocity(*jax.tree.map(lambda x, i=i: x[i : i + 1], (batch, draws)))
        chex.assert_trees_all_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_dropped_prompts_have_no_influence(model, loss, batch):
    _, params = model
    fn = jax.jit(loss)
    other = batch.replace(prompt=batch.prompt + 2)
    without, with_text = (
        [float(fn(params, x, text_dropout=dropout)) for x in (batch, other)]
        for dropout in (1.0, 0.0)
    )
    assert without[0] == without[1]
    assert abs(with_text[0] - with_text[1]) > 1e-4


def test_context_noise_has_one_level_per_chunk(batch):
    """With `context_noise_told`, and only then, the level is the context's timestep."""
    key, batch = jax.random.key(0), batch.replace(context=jnp.zeros_like(batch.context))

    def draws_with(context_noise_told):
        spec = ARLossSpec(context_noise=0.5, context_noise_told=context_noise_told)
        return draw(key, batch, chunk_frames=FRAMES, spec=spec)

    # 1. Both have the same noise; only one of them has the timestep.
    hidden, conditioned = draws_with(False), draws_with(True)
    timestep = conditioned.context_timestep
    chex.assert_trees_all_equal(hidden.replace(context_timestep=timestep), conditioned)
    assert not hidden.context_timestep.any()

    # 2. The level is uniform in [0, 0.5] per chunk, and is the noise's standard deviation.
    level = timestep / 1000
    np.testing.assert_array_equal(level[:, ::FRAMES], level[:, 1::FRAMES])
    assert ((level > 0) & (level < 0.5)).all() and len(set(np.asarray(level).flat)) > 3
    np.testing.assert_allclose(conditioned.context.std((2, 3, 4)), level, rtol=0.25)

    # 3. Without context noise the context is clean.
    clean = draw(key, batch, chunk_frames=FRAMES, spec=ARLossSpec(context_noise_told=True))
    assert not clean.context.any() and not clean.context_timestep.any()


def test_noise_levels_come_from_the_table_one_per_chunk(batch):
    draws = draw(jax.random.key(4), batch, chunk_frames=FRAMES, spec=ARLossSpec(shift=5.0))
    sigma = np.asarray(draws.sigma)
    np.testing.assert_array_equal(sigma[:, ::FRAMES], sigma[:, 1::FRAMES])
    assert len(set(sigma[:, ::FRAMES].flat)) == 6
    np.testing.assert_allclose(draws.timestep, 1000 * sigma, rtol=1e-6)
    assert not draws.context_timestep.any() and not draws.dropped.any()


def test_weights_are_bell_shaped_over_the_noise_levels_or_uniform(batch):
    bell, uniform = (
        draw(jax.random.key(4), batch, chunk_frames=FRAMES, spec=ARLossSpec(weighting=name))
        for name in ("bell", "uniform")
    )
    schedule = FlowSchedule(5.0)
    index = np.asarray(schedule.index(bell.timestep))
    np.testing.assert_allclose(bell.weight, schedule.weights[index], rtol=1e-6)
    assert (uniform.weight == 1).all()
    chex.assert_trees_all_equal(bell.replace(weight=0), uniform.replace(weight=0))


def test_the_conditioning_frame_is_clean_and_excluded_from_the_loss(batch):
    """Only chunk 0 has one, in target and context; all other draws are those without it."""

    def draws_with(image_to_video):
        spec = ARLossSpec(context_noise=0.5, image_to_video=image_to_video)
        return draw(jax.random.key(5), batch, chunk_frames=FRAMES, spec=spec)

    # 1. Draws.
    plain, image = draws_with(False), draws_with(True)
    conditioning = np.zeros(batch.target.shape[:2], bool)
    conditioning[:, 0] = True  # both samples start with chunk 0
    np.testing.assert_array_equal(image.conditioning_frame, conditioning)
    np.testing.assert_array_equal(image.sigma, np.where(conditioning, 0, plain.sigma))
    np.testing.assert_array_equal(image.timestep, np.where(conditioning, 0, plain.timestep))
    np.testing.assert_array_equal(image.context[:, 0], batch.context[:, 0])
    np.testing.assert_array_equal(image.context[:, 1:], plain.context[:, 1:])

    # 2. An error in the conditioning frame alone does not change the loss.
    error = jnp.zeros_like(batch.target).at[:, 0].set(9.0)
    exact = image.noise - batch.target
    assert float(flow_loss(exact + error, batch, image)[0]) == 0
    assert float(flow_loss(exact + error, batch, plain)[0]) > 1
