"""The rollout samples as the sampler does, and one pass over all chunks repeats its last call."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.models.params import with_params
from longlive_jax.models.wan.cache import CachePolicy, empty_cache
from longlive_jax.sampling.chunk import ChunkRequest, sample_chunk
from longlive_jax.training.objectives.dmd.draws import RolloutSpec, draw_rollout
from longlive_jax.training.objectives.dmd.losses import scene_of
from longlive_jax.training.objectives.dmd.rollout import rollout, student_pass
from pallas_kernels.attention import attention
from tests.longlive_jax.training.objectives.dmd.tiny_dmd import (
    CFG,
    GRAPHDEF,
    SIZE,
    inputs,
    relative_error,
    weights,
)

CHUNKS, CHUNK = 6, 2
SPEC = RolloutSpec(steps=3, chunks=CHUNKS, window=4)
CUTS = ((2, 4), (1,))
"""Chunks at which each sample begins a shot; the first sample's sinks are evicted and kept."""


def scene(image: bool = False, cuts=CUTS):
    cut = np.zeros((len(cuts), CHUNKS), bool)
    for row, chunks in zip(cut, cuts, strict=True):
        row[list(chunks)] = True
    arrays = {
        "prompt": jnp.arange(CHUNKS)[None].repeat(len(cuts), 0) % 4,
        "cut": jnp.asarray(cut),
    }
    if image:
        arrays["first_frame"] = jax.random.normal(jax.random.key(5), (len(cuts), *SIZE))
    return scene_of(*inputs(arrays))[0]


def draws(spec, batch: int = len(CUTS)):
    return draw_rollout(jax.random.key(3), spec, (batch, CHUNKS * CHUNK, *SIZE))


@functools.partial(jax.jit, static_argnums=0)
def both(spec, params, scene, draws):
    """The rollout, and the one pass at its exit step."""
    dit = with_params(GRAPHDEF, params)
    options = {"chunk_frames": CHUNK, "attend": attention}
    rolled = rollout(dit, scene, draws, spec, **options)
    return rolled, student_pass(dit, scene, rolled, spec, **options)


@functools.cache
def windowed(image: bool = False):
    """`both` with a window, at the last step."""
    drawn = draws(dataclasses.replace(SPEC, exit="last"))
    return both(SPEC, weights(1), scene(image), drawn)


def sampled(spec, params, scene, noise):
    """The video by the sampler, whose cache evicts."""
    size = (CHUNK, SIZE[0] // 2, SIZE[1] // 2)
    policy = CachePolicy(spec.window, spec.global_sinks, spec.shot_sinks)
    cache = empty_cache(CFG, len(noise), size, policy)
    # The estimate is taken at a level of the training table.
    solver = spec.table()
    solver = dataclasses.replace(solver, sigma=np.append(solver.sigma[:-1], spec.exit_sigmas()[-1]))

    @jax.jit
    def step(cache, noise, text, cut, offset):
        dit, b = with_params(GRAPHDEF, params), len(noise)
        request = ChunkRequest(
            noise, dit.text_kv(text), cut, offset, jnp.zeros_like(noise),
            jnp.zeros((b, CHUNK), bool), jax.random.split(jax.random.key(0), b),
        )  # fmt: skip
        return sample_chunk(dit, cache, request, solver)

    offset, video = spec.shot_rope_offset * jnp.cumsum(scene.cut, axis=1), []
    for i in range(CHUNKS):
        own = slice(i, i + 1)
        frames = noise[:, i * CHUNK : (i + 1) * CHUNK]
        x, cache = step(cache, frames, scene.text[:, own], scene.cut[:, i], offset[:, i])
        video.append(x)
    return np.concatenate(video, axis=1)


def test_a_rollout_to_the_last_step_is_a_video_of_the_sampler():
    """A window over all chunks' slots equals the sampler's cache, which overwrites its slots."""
    want = sampled(SPEC, weights(1), scene(), draws(SPEC).noise)
    assert relative_error(windowed()[0].x0, want) < 1e-5


@pytest.mark.parametrize("image", [False, True])
def test_one_pass_repeats_the_rollout(image):
    rolled, x0 = windowed(image)
    np.testing.assert_allclose(x0, rolled.x0, atol=1e-5)
    assert relative_error(rolled.x, rolled.x0) > 0.1
    if image:
        for video in (rolled.x, rolled.x0, x0):
            np.testing.assert_array_equal(video[:, 0], scene(image).first_frame)


def test_every_sample_has_its_own_cuts():
    all_noise, together = draws(dataclasses.replace(SPEC, exit="last")), windowed()
    for i, cuts in enumerate(CUTS):
        own = dataclasses.replace(all_noise, noise=all_noise.noise[i : i + 1])
        rolled, x0 = both(SPEC, weights(1), scene(cuts=(cuts,)), own)
        np.testing.assert_allclose(rolled.x0[0], together[0].x0[i], atol=1e-5)
        np.testing.assert_allclose(x0[0], together[1][i], atol=1e-5)


def test_a_packed_cache_changes_the_video_a_little():
    spec = dataclasses.replace(SPEC, kv="nvfp4")
    rolled, x0 = both(spec, weights(1), scene(), draws(dataclasses.replace(spec, exit="last")))
    assert 1e-4 < relative_error(rolled.x0, windowed()[0].x0) < 0.1
    np.testing.assert_allclose(x0, rolled.x0, atol=1e-5)


@pytest.mark.parametrize("gradients", ["detached", "reference"])
def test_a_gradient_passes_the_cache_where_the_reference_lets_it(gradients):
    """It is that of the last chunk to what the pass gets of all chunks."""
    spec = dataclasses.replace(SPEC, window=None, gradients=gradients)
    rolled, expected = whole_history()

    @jax.jit
    def by_input(x):
        def last_chunk(x):
            dit, own = with_params(GRAPHDEF, weights(1)), dataclasses.replace(rolled, x=x)
            out = student_pass(dit, scene(), own, spec, chunk_frames=CHUNK, attend=attention)
            return jnp.sum(out[:, -CHUNK:] ** 2), out

        return jax.value_and_grad(last_chunk, has_aux=True)(x)

    (_, x0), grad = by_input(rolled.x)
    np.testing.assert_allclose(x0, expected, atol=1e-5)
    earlier = np.abs(np.asarray(grad[:, :-CHUNK])).max()
    assert np.abs(np.asarray(grad[:, -CHUNK:])).max() > 1e-3
    assert earlier == 0 if gradients == "detached" else earlier > 1e-4


@functools.cache
def whole_history():
    """`both` without a window."""
    spec = dataclasses.replace(SPEC, window=None)
    return both(spec, weights(1), scene(), draws(spec))
