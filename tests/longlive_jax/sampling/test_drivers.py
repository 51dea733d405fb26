"""Scan and step, batches, guidance, conditioning: what changes a video, and what must not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax import layout
from longlive_jax.bench.timing import Compilations
from longlive_jax.diffusion import solvers
from longlive_jax.models.params import abstract, with_params
from longlive_jax.models.variants import variant
from longlive_jax.models.wan import DiT
from longlive_jax.models.wan.cache import CachePolicy, empty_cache
from longlive_jax.sampling.chunk import chunk_noise, fold_in
from longlive_jax.sampling.drivers import (
    SOLVER_KEY,
    ChunkInputs,
    Sampler,
    VideoConditioning,
    stack_chunk_inputs,
)
from tests.longlive_jax.sampling.conftest import Toy

CHUNKS = 6


def script(toy, *, cut=2, change=4):
    """Six chunks with a cut and a new prompt at chunk 2, and a third prompt at chunk 4."""
    return [
        toy.inputs([2 if i >= change else int(i >= cut)], cut=(i == cut,), shot=(int(i >= cut),))
        for i in range(CHUNKS)
    ]


@pytest.fixture(scope="module")
def video(toy):
    """The latents of the script, step by step."""
    return toy.stream(script(toy), toy.conditioning())


def test_scan_equals_stream_bit_for_bit(toy, video):
    latents, cache = toy.scan(script(toy), toy.conditioning())
    np.testing.assert_array_equal(latents, video)
    assert int(cache.num_chunks[0]) == CHUNKS and np.isfinite(video).all()


def test_a_stochastic_solver_is_a_function_of_the_seed():
    """Scan equals stream, a batch equals its videos alone, another seed gives another video."""
    toy = Toy()
    chunks = script(toy)

    def conditioning(*seeds):
        return toy.conditioning(seeds, solver=solvers.sde)

    alone = [toy.stream(chunks, conditioning(seed)) for seed in (0, 1)]
    latents, _ = toy.scan(chunks, conditioning(0))
    np.testing.assert_array_equal(latents, alone[0])
    pair = [
        toy.inputs(
            [int(i) for i in np.repeat(x.text, 2)],
            np.repeat(x.cut, 2),
            np.repeat(x.shot_rope_offset, 2) // 8,
        )
        for x in chunks
    ]
    both, _ = toy.scan(pair, conditioning(0, 1), rows=2)
    np.testing.assert_allclose(both, np.concatenate(alone), atol=2e-5)
    assert np.abs(alone[0] - alone[1]).max() > 0.1


def test_solver_noise_differs_from_the_initial_noise_of_all_chunks(toy):
    keys = jnp.stack([jax.random.key(3)])
    initial = [chunk_noise(keys, c, (8,)) for c in range(4)]
    steps = [
        chunk_noise(fold_in(fold_in(keys, SOLVER_KEY), c), k, (8,))
        for c in range(4)
        for k in range(3)
    ]
    samples = np.stack([np.asarray(x).reshape(-1) for x in (*initial, *steps)])
    assert len(np.unique(samples.round(4), axis=0)) == len(samples)


def test_the_video_is_a_function_of_the_seed(toy, video):
    again = toy.stream(script(toy), toy.conditioning())
    np.testing.assert_array_equal(again, video)
    other = toy.stream(script(toy), toy.conditioning(seeds=(1,)))
    assert np.abs(other - video).max() > 0.1


def test_a_change_affects_its_chunk_and_later_ones_only(toy, video):
    """A prompt change without a cut and a cut without a prompt change are different things."""
    plain = script(toy, cut=99, change=99)
    prompt = [x if i < 3 else toy.inputs([3]) for i, x in enumerate(plain)]
    cut = [x if i < 3 else toy.inputs([0], cut=(i == 3,), shot=(1,)) for i, x in enumerate(plain)]
    runs = [toy.stream(chunks, toy.conditioning()) for chunks in (plain, prompt, cut)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        np.testing.assert_array_equal(runs[a][:, :6], runs[b][:, :6])
        assert np.abs(runs[a][:, 6:8] - runs[b][:, 6:8]).max() > 1e-4


def test_a_conditioning_frame_is_reproduced_exactly_and_changes_the_video(toy, video):
    frame = jax.random.normal(jax.random.key(5), (1, *toy.shape[1:]))
    got = toy.stream(script(toy), toy.conditioning(frame=frame))
    np.testing.assert_array_equal(got[:, 0], frame)
    assert np.abs(got[:, 1] - video[:, 1]).max() > 1e-4


def test_one_compilation_for_all_chunks_prompts_cuts_seeds_and_conditioning_frames():
    toy = Toy()
    with Compilations() as compiled:
        toy.stream(script(toy), toy.conditioning())
        frame = jnp.ones((1, *toy.shape[1:]))
        toy.stream(script(toy, cut=1, change=5), toy.conditioning(seeds=(77,), frame=frame))
    assert compiled.counts["_step"] == 1


def test_a_batch_member_equals_the_video_alone(toy, video):
    """Two scripts with cuts at different chunks, in one batch."""
    other = script(toy, cut=3, change=5)
    alone = toy.stream(other, toy.conditioning(seeds=(9,)))

    def joined(*pair):
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *pair)

    both = [joined(*pair) for pair in zip(script(toy), other, strict=True)]
    latents, _ = toy.scan(both, toy.conditioning(seeds=(0, 9)), rows=2)
    np.testing.assert_allclose(latents[:1], video, atol=2e-4)
    np.testing.assert_allclose(latents[1:], alone, atol=2e-4)


def test_guidance_of_1_is_the_plain_video_and_4_is_not(toy, video):
    def guided(scale):
        negative = [x.replace(text=jnp.concatenate([x.text, jnp.array([3])])) for x in script(toy)]
        return toy.scan(negative, toy.conditioning(guidance=scale), rows=2)[0]

    np.testing.assert_allclose(guided(1.0), video, atol=2e-4)
    assert np.abs(guided(4.0) - video).max() > 1e-4


@pytest.mark.parametrize("steps", [1, 2, 4, 50])
def test_number_of_steps(toy, steps):
    latents, _ = toy.scan(script(toy)[:2], toy.conditioning(steps=steps))
    assert latents.shape == (1, 4, 6, 8, 4) and np.isfinite(latents).all()


def test_a_video_whose_latents_fill_the_cache_continues_as_it_did(toy, video):
    cache, conditioning, chunks = toy.cache(), toy.conditioning(), script(toy)
    for i in range(3):
        latents = jnp.asarray(video[:, 2 * i : 2 * i + 2])
        inputs = toy.with_text_kv(chunks[i])
        cache = toy.sampler.write_context(toy.params, cache, conditioning, inputs, latents)
    rest = toy.stream(chunks[3:], conditioning, cache=cache)
    np.testing.assert_allclose(rest, video[:, 6:], atol=2e-4)


def test_relative_positions_equal_absolute_ones_until_the_first_eviction(toy):
    plain = [toy.inputs([0]) for _ in range(CHUNKS)]
    policy = dataclasses.replace(toy.policy, relative_rope=True)
    absolute, _ = toy.scan(plain, toy.conditioning())
    relative, _ = toy.scan(plain, toy.conditioning(), policy=policy)
    np.testing.assert_allclose(relative[:, :8], absolute[:, :8], atol=2e-4)
    assert np.abs(relative[:, 8:] - absolute[:, 8:]).max() > 1e-4


def test_noise_depends_on_seed_and_chunk_only():
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
    features = jax.random.normal(jax.random.key(4), (1, chunks, 6, 12))
    dit = with_params(toy.graphdef, toy.params)

    # 1. All chunks in one sequence, with the attention mask of training.
    shot_rope_offset = jnp.repeat(jnp.asarray(8 * shots, jnp.int32), frames)
    tokens = layout.teacher_forcing(
        chunks * frames, rows, columns, chunk_frames=frames, shot_rope_offset=shot_rope_offset
    )
    marks = jnp.asarray([c == 0 or c in cuts for c in range(chunks)])
    tokens = layout.windowed(tokens, marks, window=4, global_sinks=1)
    times = jnp.concatenate([jnp.zeros(chunks * frames), jnp.full(chunks * frames, 700.0)])

    @jax.jit
    def masked(latents):
        text_kv = dit.text_kv(features, streams=2)
        return dit(latents, times[None], text_kv, tokens, noisy_from=chunks * frames)[0]

    want = masked(jnp.concatenate([clean, noisy], axis=1))

    # 2. Chunk by chunk against the cache.
    @jax.jit
    def cached(cache, x, text, shot_rope_offset):
        tokens = cache.upcoming(shot_rope_offset, noisy=True)
        return dit(x, jnp.full((1, frames), 700.0), text, tokens, cache)[0]

    cache, conditioning = toy.cache(), toy.conditioning()
    for c in range(chunks):
        span = slice(c * frames, (c + 1) * frames)
        inputs = ChunkInputs(
            text=toy.sampler.text(toy.params, features[:, c]),
            cut=jnp.array([c in cuts]),
            shot_rope_offset=jnp.array([8 * shots[c]], jnp.int32),
        )
        got = cached(cache, noisy[:, span], inputs.text, inputs.shot_rope_offset)
        np.testing.assert_allclose(got, want[:, span], atol=2e-4)
        cache = toy.sampler.write_context(toy.params, cache, conditioning, inputs, clean[:, span])


def test_the_cache_is_updated_in_place(toy):
    cache, inputs = toy.cache(), toy.with_text_kv(script(toy)[0])
    lowered = toy.sampler.step.lower(toy.params, cache, toy.conditioning(), inputs)
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
        conditioning = VideoConditioning(
            solver=jax.tree.map(jnp.asarray, solvers.unipc(4)),
            keys=jnp.stack([jax.random.key(0)]),
            conditioning_frame=jnp.zeros((1, 44, 80, 48)),
            has_conditioning_frame=jnp.zeros(1, bool),
            guidance=None if guidance is None else jnp.float32(guidance),
        )
        return cache, conditioning, jnp.zeros(1, bool), jnp.zeros(1, jnp.int32)

    cache, conditioning, cut, offset = jax.eval_shape(arguments)
    sampler = Sampler(graphdef)
    features = jax.ShapeDtypeStruct((rows, 512, cfg.text_dim), jnp.bfloat16)
    text = jax.eval_shape(sampler.text, params, features)
    lowered = sampler.step.lower(params, cache, conditioning, ChunkInputs(text, cut, offset))
    latents, after = lowered.out_info
    assert latents.shape == (1, 8, 44, 80, 48) and after.k.shape == (30, rows, 3, 7040, 24, 128)


def test_chunk_inputs_stack(toy):
    stacked = stack_chunk_inputs(script(toy))
    assert stacked.text.shape == (CHUNKS, 1) and stacked.noise is None
