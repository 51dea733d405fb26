"""Scan and stream, batches, guidance, conditioning: what changes the video, and what must not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax import layout
from longlive_jax.diffusion import solvers
from longlive_jax.models.params import abstract, with_params
from longlive_jax.models.variants import variant
from longlive_jax.models.wan import DiT
from longlive_jax.models.wan.cache import CachePolicy, empty_cache
from longlive_jax.sampling.chunk import chunk_noise, folded
from longlive_jax.sampling.drivers import (
    SOLVER_DRAWS,
    ChunkInputs,
    Sampler,
    VideoConditioning,
    stack_chunk_inputs,
)
from tests.longlive_jax.sampling.conftest import Toy

CHUNKS = 6


def orders(toy, *, cut=2, change=4):
    """A cut with a new prompt at chunk 2, another prompt without a cut at chunk 4."""
    made = []
    for i in range(CHUNKS):
        text = 2 if i >= change else int(i >= cut)
        made.append(toy.order([text], cut=(i == cut,), shot=(int(i >= cut),)))
    return made


@pytest.fixture(scope="module")
def video(toy):
    """The latents of the plain run, by stream."""
    return np.concatenate(toy.stream(orders(toy), toy.setting()), axis=1)


def test_scan_equals_stream_bit_for_bit(toy, video):
    latents, cache = toy.sample(orders(toy), toy.setting())
    np.testing.assert_array_equal(latents, video)
    assert int(cache.num_chunks[0]) == CHUNKS and np.isfinite(video).all()


def test_a_solver_with_noise_of_its_own_is_still_a_function_of_the_seed():
    """Scan = stream, batch = alone, another seed another video."""
    toy = Toy()
    made = orders(toy)

    def setting(*seeds):
        return toy.setting(seeds, solver=solvers.sde)

    alone = [np.concatenate(toy.stream(made, setting(seed)), axis=1) for seed in (0, 1)]
    latents, _ = toy.sample(made, setting(0))
    np.testing.assert_array_equal(latents, alone[0])
    pair = [
        toy.order(
            [int(i) for i in np.repeat(o.text, 2)],
            np.repeat(o.cut, 2),
            np.repeat(o.shot_rope_offset, 2) // 8,
        )
        for o in made
    ]
    both, _ = toy.sample(pair, setting(0, 1), rows=2)
    np.testing.assert_allclose(both, np.concatenate(alone), atol=2e-5)
    assert np.abs(alone[0] - alone[1]).max() > 0.1


def test_a_solvers_noise_is_apart_from_the_chunks(toy):
    """No step of any chunk draws what a chunk begins from."""
    keys = jnp.stack([jax.random.key(3)])
    starts = [chunk_noise(keys, c, (8,)) for c in range(4)]
    steps = [
        chunk_noise(folded(folded(keys, SOLVER_DRAWS), c), k, (8,))
        for c in range(4)
        for k in range(3)
    ]
    drawn = np.stack([np.asarray(x).reshape(-1) for x in (*starts, *steps)])
    assert len(np.unique(drawn.round(4), axis=0)) == len(drawn)


def test_same_seed_same_video_other_seed_other_video(toy, video):
    again = np.concatenate(toy.stream(orders(toy), toy.setting()), axis=1)
    np.testing.assert_array_equal(again, video)
    other = np.concatenate(toy.stream(orders(toy), toy.setting(seeds=(1,))), axis=1)
    assert np.abs(other - video).max() > 0.1


def test_a_change_is_felt_from_its_chunk_on_only(toy, video):
    """A prompt change without a cut, a cut without a prompt change: different things."""
    plain = orders(toy, cut=99, change=99)
    prompt = [o if i < 3 else toy.order([3]) for i, o in enumerate(plain)]
    cut = [o if i < 3 else toy.order([0], cut=(i == 3,), shot=(1,)) for i, o in enumerate(plain)]
    runs = [np.concatenate(toy.stream(o, toy.setting()), axis=1) for o in (plain, prompt, cut)]
    for one, two in ((0, 1), (0, 2), (1, 2)):
        np.testing.assert_array_equal(runs[one][:, :6], runs[two][:, :6])
        assert np.abs(runs[one][:, 6:8] - runs[two][:, 6:8]).max() > 1e-4


def test_first_frame_given(toy, video):
    """It comes back exactly, changes everything, and compiles nothing."""
    first = jax.random.normal(jax.random.key(5), (1, *toy.shape[1:]))
    got = np.concatenate(toy.stream(orders(toy), toy.setting(first=first)), axis=1)
    np.testing.assert_array_equal(got[:, 0], first)
    assert np.abs(got[:, 1] - video[:, 1]).max() > 1e-4


def test_one_compilation_for_everything(toy, video):
    assert toy.sampler.step._cache_size() == 1
    first = jnp.ones((1, *toy.shape[1:]))
    toy.stream(orders(toy, cut=1, change=5), toy.setting(seeds=(77,), first=first))
    assert toy.sampler.step._cache_size() == 1


def test_an_order_is_taken_at_the_last_moment(toy, video):
    """Steering: the orders are a generator that looks at what came before."""
    seen = []

    def live():
        for i, order in enumerate(orders(toy)):
            assert len(seen) == i
            yield toy.words(order)

    for latents in toy.sampler.stream(toy.params, toy.cache(), toy.setting(), live()):
        seen.append(latents)
    np.testing.assert_array_equal(np.concatenate(seen, axis=1), video)


def test_a_batch_member_equals_the_video_alone(toy, video):
    """Two scripts with cuts at different chunks, in one batch."""
    other = orders(toy, cut=3, change=5)
    alone = np.concatenate(toy.stream(other, toy.setting(seeds=(9,))), axis=1)

    def joined(*pair):
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *pair)

    both = [joined(*pair) for pair in zip(orders(toy), other, strict=True)]
    latents, _ = toy.sample(both, toy.setting(seeds=(0, 9)), rows=2)
    np.testing.assert_allclose(latents[:1], video, atol=2e-4)
    np.testing.assert_allclose(latents[1:], alone, atol=2e-4)


def test_guidance(toy, video):
    """Scale 1 is the plain video; another is not, and needs rows for the negative prompts."""

    def guided(scale):
        negative = [o.replace(text=jnp.concatenate([o.text, jnp.array([3])])) for o in orders(toy)]
        return toy.sample(negative, toy.setting(guidance=scale), rows=2)[0]

    np.testing.assert_allclose(guided(1.0), video, atol=2e-4)
    assert np.abs(guided(4.0) - video).max() > 1e-4


@pytest.mark.parametrize("steps", [1, 2, 4, 50])
def test_number_of_steps(toy, steps):
    latents, _ = toy.sample(orders(toy)[:2], toy.setting(steps=steps))
    assert latents.shape == (1, 4, 6, 8, 4) and np.isfinite(latents).all()


def test_a_video_is_continued(toy, video):
    """Its latents fill the cache chunk by chunk; what follows is what followed when it was made."""
    cache, setting, words = toy.cache(), toy.setting(), list(map(toy.words, orders(toy)))
    for i in range(3):
        past = jnp.asarray(video[:, 2 * i : 2 * i + 2])
        cache = toy.sampler.write_context(toy.params, cache, setting, words[i], past)
    rest = list(toy.sampler.stream(toy.params, cache, setting, words[3:]))
    np.testing.assert_allclose(np.concatenate(rest, axis=1), video[:, 6:], atol=2e-4)


def test_relative_positions_equal_absolute_ones_until_something_is_forgotten(toy):
    plain = [toy.order([0]) for _ in range(CHUNKS)]
    policy = dataclasses.replace(toy.policy, relative_rope=True)
    absolute, _ = toy.sample(plain, toy.setting())
    relative, _ = toy.sample(plain, toy.setting(), policy=policy)
    np.testing.assert_allclose(relative[:, :8], absolute[:, :8], atol=2e-4)
    assert np.abs(relative[:, 8:] - absolute[:, 8:]).max() > 1e-4


def test_noise_depends_on_seed_and_chunk_alone():
    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
    both = chunk_noise(keys, 3, (2, 2, 2, 4))
    np.testing.assert_array_equal(both[1:], chunk_noise(keys[1:], 3, (2, 2, 2, 4)))
    assert np.abs(both - chunk_noise(keys, 4, (2, 2, 2, 4))).max() > 0.1


@pytest.mark.parametrize("cuts", [(), (5,), (2, 6), (4, 5)])
def test_cached_equals_masked(toy, cuts):
    """The velocity of every chunk against the cache is its velocity in one masked sequence."""
    chunks, (frames, rows, columns) = 8, toy.size
    keys = jax.random.split(jax.random.key(3), 2)
    clean, noisy = (jax.random.normal(k, (1, chunks * frames, 6, 8, 4)) for k in keys)
    shots = np.cumsum([c in cuts for c in range(chunks)])
    texts = jax.random.normal(jax.random.key(4), (1, chunks, 6, 12))
    dit = with_params(toy.graphdef, toy.params)

    shot_rope_offset = jnp.repeat(jnp.asarray(8 * shots, jnp.int32), frames)
    tokens = layout.teacher_forcing(
        chunks * frames, rows, columns, chunk_frames=frames, shot_rope_offset=shot_rope_offset
    )
    marks = jnp.asarray([c == 0 or c in cuts for c in range(chunks)])
    tokens = layout.windowed(tokens, marks, window=4, global_sinks=1)
    times = jnp.concatenate([jnp.zeros(chunks * frames), jnp.full(chunks * frames, 700.0)])

    @jax.jit
    def masked(latents):
        words = dit.text_kv(texts, streams=2)
        return dit(latents, times[None], words, tokens, noisy_from=chunks * frames)[0]

    want = masked(jnp.concatenate([clean, noisy], axis=1))

    @jax.jit
    def cached(cache, x, text, shot_rope_offset):
        tokens = cache.upcoming(shot_rope_offset, noisy=True)
        return dit(x, jnp.full((1, frames), 700.0), text, tokens, cache)[0]

    cache, setting = toy.cache(), toy.setting()
    for c in range(chunks):
        span = slice(c * frames, (c + 1) * frames)
        order = ChunkInputs(
            text=toy.sampler.text(toy.params, texts[:, c]),
            cut=jnp.array([c in cuts]),
            shot_rope_offset=jnp.array([8 * shots[c]], jnp.int32),
        )
        got = cached(cache, noisy[:, span], order.text, order.shot_rope_offset)
        np.testing.assert_allclose(got, want[:, span], atol=2e-4)
        cache = toy.sampler.write_context(toy.params, cache, setting, order, clean[:, span])


def test_the_cache_is_updated_in_place(toy):
    cache = toy.cache()
    lowered = toy.sampler.step.lower(toy.params, cache, toy.setting(), toy.words(orders(toy)[0]))
    aliased = lowered.compile().memory_analysis().alias_size_in_bytes
    assert aliased >= cache.k.nbytes + cache.v.nbytes


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_the_5b_model_lowers_at_full_size(guidance):
    """One chunk of 8 latents at 704x1280 with a window of 32; nothing is allocated."""
    cfg = dataclasses.replace(
        variant("wan2_2_ti2v_5b")["dit"], dtype=jnp.bfloat16, param_dtype=jnp.bfloat16
    )
    graphdef, params = abstract(lambda: DiT(cfg, rngs=nnx.Rngs(0)))
    rows = 1 if guidance is None else 2

    def arguments():
        cache = empty_cache(cfg, rows, (8, 22, 40), CachePolicy())
        setting = VideoConditioning(
            solver=jax.tree.map(jnp.asarray, solvers.unipc(4)),
            keys=jnp.stack([jax.random.key(0)]),
            first=jnp.zeros((1, 44, 80, 48)),
            given=jnp.zeros(1, bool),
            guidance=None if guidance is None else jnp.float32(guidance),
        )
        return cache, setting, jnp.zeros(1, bool), jnp.zeros(1, jnp.int32)

    cache, setting, cut, shot_rope_offset = jax.eval_shape(arguments)
    sampler = Sampler(graphdef)
    words = jax.ShapeDtypeStruct((rows, 512, cfg.text_dim), jnp.bfloat16)
    text = jax.eval_shape(sampler.text, params, words)
    lowered = sampler.step.lower(params, cache, setting, ChunkInputs(text, cut, shot_rope_offset))
    latents, after = lowered.out_info
    assert latents.shape == (1, 8, 44, 80, 48) and after.k.shape == (30, rows, 3, 7040, 24, 128)


def test_orders_stack(toy):
    stacked = stack_chunk_inputs(orders(toy))
    assert stacked.text.shape == (CHUNKS, 1) and stacked.noise is None
