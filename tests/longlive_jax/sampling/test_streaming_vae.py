"""Decoding chunk by chunk with the state as data, and the VAE on a device of its own."""

import jax
import numpy as np
import pytest

from longlive_jax.bench.timing import Compilations
from longlive_jax.models.vae import decode
from longlive_jax.sampling.streaming_vae import DecoderState, StreamingVAE
from tests.tiny import tiny_parts


@pytest.fixture(scope="module")
def vae():
    return tiny_parts()[1]


@pytest.fixture(scope="module")
def latents():
    return np.asarray(jax.random.normal(jax.random.key(0), (1, 6, 4, 2, 4)))


def decoded(streaming, latents):
    state, frames = DecoderState(), []
    for i in range(0, latents.shape[1], 2):
        x, is_finite, state = streaming.decode(state, latents[:, i : i + 2])
        assert is_finite
        frames.append(x)
    return np.concatenate(frames, axis=1), state


def test_chunks_equal_the_decoded_clip_with_two_compilations(vae, latents):
    """The first chunk decodes to 1 + 4 (n - 1) frames and has a compiled function of its own."""
    with Compilations() as compiled:
        streaming = StreamingVAE(vae)
        got, _ = decoded(streaming, latents)
        decoded(streaming, latents)
    assert compiled.counts["_decode_frames"] == 2
    pixels = np.asarray(jax.jit(decode, static_argnames="chunk_frames")(vae, latents))
    want = np.rint((np.clip(pixels, -1, 1) + 1) * 127.5)
    assert got.shape == (1, 21, 64, 32, 3) and np.abs(got - want).max() <= 1


def test_the_state_is_donated(vae, latents):
    streaming = StreamingVAE(vae)
    _, state = decoded(streaming, latents)
    tails = jax.tree.leaves(state)
    streaming.decode(state, latents[:, :2])
    assert tails and all(x.is_deleted() for x in tails)


def test_a_device_of_its_own(vae, latents):
    device = jax.devices()[3]
    got, state = decoded(StreamingVAE(vae, device), latents)
    assert {x.device for x in jax.tree.leaves(state)} == {device}
    np.testing.assert_array_equal(got, decoded(StreamingVAE(vae), latents)[0])


def test_latents_that_are_not_finite_are_reported(vae, latents):
    bad = latents.copy()
    bad[0, 1, 0, 0, 0] = np.nan
    _, is_finite, _ = StreamingVAE(vae).decode(DecoderState(), bad[:, :2])
    assert not is_finite
