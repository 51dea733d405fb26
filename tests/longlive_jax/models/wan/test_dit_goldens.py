"""The DiT against numbers of the PyTorch reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.interop.keys_dit import ORIGINAL
from longlive_jax.interop.transforms import TRANSFORMS
from longlive_jax.layout import grid, teacher_forcing
from longlive_jax.models.params import with_params

TOLERANCE = 1e-4


def relative_error(got, want):
    got, want = np.asarray(got), np.asarray(want)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def size(golden, name="x"):
    """(frames, rows, columns) in tokens."""
    _, _, frames, height, width = golden.arrays[name].shape
    return frames, height // 2, width // 2


def _run(golden, times, text, tokens):
    @jax.jit
    def velocity(params, latents, times, text):
        dit = with_params(golden.graphdef, params)
        return dit(latents, times, dit.text_kv(text), tokens)[0]

    return velocity(golden.params, golden.video("x"), times, text)


def test_parameters_have_the_models_shapes(bidirectional):
    want = jax.tree.map(lambda leaf: leaf.shape, bidirectional.shapes)
    assert jax.tree.map(jnp.shape, bidirectional.params) == want


@pytest.mark.parametrize("scalar", [False, True], ids=["per token", "per frame"])
def test_bidirectional(bidirectional, scalar):
    golden = bidirectional
    frames, rows, columns = size(golden)
    times = golden["t_tokens"]
    if scalar:
        times = jnp.repeat(golden["t_scalar"][:, None], frames, axis=1)
    tokens = grid(frames, rows, columns, chunk_frames=frames)
    got = _run(golden, times, golden["context"][:, None], tokens)
    want = golden.video("y_scalar_t" if scalar else "y")
    assert relative_error(got, want) < TOLERANCE


def test_block_causal(forced):
    tokens = grid(*size(forced), chunk_frames=forced.meta["num_frame_per_block"])
    got = _run(forced, forced["t"], _prompts(forced), tokens)
    assert relative_error(got, forced.video("y_blockwise_causal")) < TOLERANCE


def _prompts(golden):
    """Context rows b * blocks + i as [b, blocks, t, e]."""
    context = golden["context"]
    return context.reshape(-1, golden.meta["num_blocks"], *context.shape[1:])


def _loss(params, golden, aug, shot_rope_offset=None):
    dit = with_params(golden.graphdef, params)
    latents = jnp.concatenate([golden.video("clean"), golden.video("x")], axis=1)
    times = jnp.concatenate([aug, golden["t"]], axis=1)
    frames, rows, columns = size(golden)
    chunk = golden.meta["num_frame_per_block"]
    tokens = teacher_forcing(
        frames, rows, columns, chunk_frames=chunk, shot_rope_offset=shot_rope_offset
    )
    text = dit.text_kv(_prompts(golden), streams=2)
    velocity, _ = dit(latents, times, text, tokens, noisy_from=frames)
    return jnp.mean((velocity - golden.video("target")) ** 2), velocity


@pytest.mark.parametrize("suffix", ["", "_rope_offset"])
def test_teacher_forcing_outputs_loss_and_gradients(forced, suffix):
    shot_rope_offset = forced["rope_offset"] if suffix else None

    @jax.jit
    def run(params):
        return jax.value_and_grad(_loss, has_aux=True)(
            params, forced, forced["aug_t"], shot_rope_offset
        )

    (loss, velocity), grads = run(forced.params)
    assert relative_error(velocity, forced.video(f"y{suffix}")) < TOLERANCE
    np.testing.assert_allclose(loss, forced[f"loss{suffix}"], rtol=TOLERANCE)
    prefix = f"grad{suffix}/"
    expected = {k.removeprefix(prefix): v for k, v in forced.arrays.items() if k.startswith(prefix)}
    assert expected
    for key, want in expected.items():
        rule, fields = ORIGINAL.match(key)
        got = grads
        for name in rule.path_of(fields):
            got = got[name]
        got = got[int(fields["layer"])] if rule.stacked else got
        want = TRANSFORMS[rule.transform].forward(want)
        assert relative_error(got, want) < TOLERANCE, key


def test_teacher_forcing_without_noise_on_the_context(forced):
    run = jax.jit(lambda params: _loss(params, forced, jnp.zeros_like(forced["aug_t"]))[1])
    velocity = run(forced.params)
    assert relative_error(velocity, forced.video("y_aug0")) < TOLERANCE
